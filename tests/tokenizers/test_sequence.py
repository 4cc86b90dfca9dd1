"""Sequences of both layouts: order, labels, grid cells, forced tokens, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary


class Digits:
    """Spells sizes with one id per character."""

    def encode(self, text, *, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(c) for c in text]


OWN = SequenceFormat(Vocabulary(10, 6, 4), (2, 3), (2, 2))
EMU3 = SequenceFormat.for_tokenizer(Vocabulary.emu3(codes=6, text_size=300), (2, 3), (2, 2), Digits())
IMAGE = np.arange(6).reshape(2, 3)
MASK = np.array([[3, 1], [0, 2]])


def test_own_layout_token_by_token():
    v = OWN.vocabulary
    ids, labels = OWN.build([7, 8], IMAGE, MASK)
    image = [v.image_range[0] + i for i in range(6)]
    mask = [v.mask_range[0] + i for i in (3, 1, 0, 2)]
    assert ids.tolist() == [v.bos, 7, 8, v.boi, *image, v.eoi, v.bom, *mask, v.eom]
    assert labels.tolist() == [-100] * 12 + [*mask, v.eom]
    assert ids.dtype == labels.dtype == np.int64


def test_emu3_layout_token_by_token():
    v = EMU3.vocabulary
    ids, labels = EMU3.build([7], IMAGE, MASK)
    lo, eol = v.image_range[0], v.row_end
    image = [lo, lo + 1, lo + 2, eol, lo + 3, lo + 4, lo + 5, eol]
    size = [ord(c) for c in "2*3"]
    prompt = [v.bos, 7, v.boi, *size, v.image_token, *image, v.frame_end, v.eoi]
    prompt += [v.boi, *[ord(c) for c in "2*2"], v.image_token]
    mask = [lo + 3, lo + 1, eol, lo, lo + 2, eol, v.frame_end, v.eoi]
    assert ids.tolist() == prompt + mask
    x = -100
    assert labels.tolist() == [x] * len(prompt) + [lo + 3, lo + 1, x, lo, lo + 2, x, x, v.eoi]


@pytest.mark.parametrize("fmt", [OWN, EMU3], ids=["ntpseg", "emu3"])
def test_prompt_and_target_make_the_sequence(fmt):
    ids, labels = fmt.build([1, 2], IMAGE, MASK)
    assert np.array_equal(ids, np.concatenate([fmt.prompt([1, 2], IMAGE), fmt.target(MASK)]))
    assert len(fmt.target(MASK)) == fmt.num_target
    lo, hi = fmt.vocabulary.supervised_range
    supervised = labels[labels != -100]
    assert len(supervised) == fmt.mask_cells + 1
    assert supervised.min() >= lo
    assert supervised.max() < hi
    assert ids.max() < fmt.vocabulary.size


@pytest.mark.parametrize("fmt", [OWN, EMU3], ids=["ntpseg", "emu3"])
def test_forced_tokens_are_those_of_every_target(fmt):
    target = fmt.target(MASK)
    forced = [fmt.forced(i) for i in range(fmt.num_target)]
    assert all(f is None or f == t for f, t in zip(forced, target, strict=True))
    assert forced.count(None) == fmt.mask_cells
    with pytest.raises(ValueError, match="index must be"):
        fmt.forced(fmt.num_target)


@pytest.mark.parametrize("fmt", [OWN, EMU3], ids=["ntpseg", "emu3"])
def test_grid_ids_number_the_cells_in_order(fmt):
    ids, _ = fmt.build([1], IMAGE, MASK)
    grid = fmt.grid_ids(ids)
    assert grid[grid > 0].tolist() == list(range(1, 11))
    lo, hi = fmt.vocabulary.image_range[0], fmt.vocabulary.mask_range[1]
    assert np.array_equal(grid > 0, (ids >= lo) & (ids < hi))
    assert np.array_equal(fmt.target_grid_ids, grid[-fmt.num_target :])
    assert fmt.grid_positions == 10


def test_grid_ids_of_a_padded_batch():
    ids, _ = OWN.build([1], IMAGE, MASK)
    pad = np.full(3, OWN.vocabulary.pad)
    batch = OWN.grid_ids(np.stack([np.concatenate([ids, pad]), np.concatenate([pad, ids])]))
    assert np.array_equal(batch[0, :-3], OWN.grid_ids(ids))
    assert np.array_equal(batch[1, 3:], OWN.grid_ids(ids))
    assert not batch[0, -3:].any()
    with pytest.raises(ValueError, match=r"at most 10 codes in a row .* got 20"):
        OWN.grid_ids(np.concatenate([ids, ids]))


@pytest.mark.parametrize("fmt", [OWN, EMU3], ids=["ntpseg", "emu3"])
def test_parse_is_the_inverse_of_target(fmt):
    assert np.array_equal(fmt.parse(fmt.target(MASK)), MASK)
    with pytest.raises(ValueError, match="target_ids must be"):
        fmt.parse(fmt.target(MASK)[:-1])
    bad = fmt.target(MASK)
    bad[0] = fmt.vocabulary.bos
    with pytest.raises(ValueError, match=f"where a mask code is expected, got {fmt.vocabulary.bos}"):
        fmt.parse(bad)


@pytest.mark.parametrize("fmt", [OWN, EMU3], ids=["ntpseg", "emu3"])
def test_dict_round_trip_through_json(fmt):
    import json

    assert SequenceFormat.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layout=st.sampled_from(["ntpseg", "emu3"]))
def test_any_grid_and_codes_round_trip(data, layout):
    grids = [tuple(data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))) for _ in range(2)]
    vocabulary = Vocabulary.emu3(7, 300) if layout == "emu3" else Vocabulary(300, 7, 7)
    fmt = SequenceFormat.for_tokenizer(vocabulary, *grids, Digits())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    image, mask = rng.integers(0, 7, grids[0]), rng.integers(0, 7, grids[1]).astype(np.uint16)
    text = rng.integers(0, 300, data.draw(st.integers(0, 4))).tolist()
    ids, labels = fmt.build(text, image, mask)
    assert len(ids) == len(labels)
    assert np.array_equal(fmt.parse(ids[-fmt.num_target :]), mask)
    assert fmt.grid_ids(ids).max() == fmt.grid_positions


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OWN.prompt([10], IMAGE), "text_ids must be .* got values from 10 to 10"),
        (lambda: OWN.prompt([1], IMAGE.T), r"image_codes must be integers .* got int64 \[3, 2\]"),
        (lambda: OWN.prompt([1], IMAGE + 1), "image_codes must be .* got values from 1 to 6"),
        (lambda: OWN.target(MASK * 1.0), "mask_codes must be .* got float64"),
        (lambda: OWN.target(MASK - 1), "mask_codes must be .* got values from -1 to 2"),
        (lambda: SequenceFormat(OWN.vocabulary, (2, 0), (2, 2)), "image_grid must be"),
        (lambda: SequenceFormat(OWN.vocabulary, (2, 2), (2, 2), "emu3"), "layout must be .* got 'emu3'"),
        (lambda: SequenceFormat(EMU3.vocabulary, (2, 2), (2, 2)), "image_size_ids must be"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
