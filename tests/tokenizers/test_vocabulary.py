"""Ids: contiguous, disjoint, and Emu3's own where its weights need them."""

from __future__ import annotations

import pytest

from ntpseg.tokenizers.vocabulary import Vocabulary


def test_own_layout_fills_the_id_space_without_gap_or_overlap():
    v = Vocabulary(text_size=300, image_codes=17, mask_codes=9)
    ids = [*range(300), v.pad, v.bos, v.boi, v.eoi, v.bom, *range(*v.image_range), *range(*v.mask_range), v.eom]
    assert ids == list(range(v.size))
    assert v.supervised_range == (v.mask_range[0], v.eom + 1)


def test_a_shared_codebook_gives_image_and_mask_the_same_ids():
    v = Vocabulary(300, 17, 17, shared_codebook=True)
    assert v.mask_range == v.image_range
    assert v.eom == v.image_range[1] == v.size - 1


def test_emu3_ids_are_those_of_its_published_vocabulary():
    v = Vocabulary.emu3()
    assert v.size == 184_622
    assert (v.pad, v.row_end, v.frame_end, v.bos) == (151_643, 151_846, 151_847, 151_849)
    assert (v.image_token, v.boi, v.eoi) == (151_851, 151_852, 151_853)
    assert v.image_range == (151_854, 184_622)
    assert v.supervised_range == (151_853, 184_622)
    assert v.supervised_range[0] <= v.eom < v.supervised_range[1]


@pytest.mark.parametrize("vocabulary", [Vocabulary(5, 3, 4), Vocabulary(5, 3, 3, True), Vocabulary.emu3(8, 300)])
def test_dict_round_trip(vocabulary):
    assert Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_size": 0, "image_codes": 1, "mask_codes": 1}, "text_size must be an integer >= 1, got 0"),
        ({"text_size": 1, "image_codes": -3, "mask_codes": 1}, "image_codes must be an integer >= 0, got -3"),
        ({"text_size": 1, "image_codes": 2, "mask_codes": 3, "shared_codebook": True}, "must equal image_codes"),
        ({"text_size": 1, "image_codes": 2, "mask_codes": 2, "layout": "emu3"}, "shared_codebook must be True"),
        (
            {"text_size": 1, "image_codes": 2, "mask_codes": 2, "layout": "gpt"},
            "layout must be one of .* got 'gpt'",
        ),
    ],
)
def test_contradictions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(**arguments)


def test_row_ends_exist_in_emu3_only():
    with pytest.raises(ValueError, match="layout must be 'emu3' for row_end"):
        _ = Vocabulary(5, 3, 4).row_end
