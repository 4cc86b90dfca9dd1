"""Jacobi decoding gives greedy's tokens, whatever drafts it starts from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import feature_format, make_feature_model, make_images, make_model, make_prompts, sequence_format

from ntpseg.generation import DecodingOptions, generate_masks
from ntpseg.generation.decoder import PromptBatch
from ntpseg.generation.generate import draft_source
from ntpseg.generation.jacobi import copy_cells
from ntpseg.generation.native import NativeDecoder
from ntpseg.generation.options import NonFiniteOutput


def assert_greedy(model: Any, sequence: Any, prompts: list[np.ndarray], images: Any = None, **fields: Any) -> list[Any]:
    """Equal codes, log-probabilities and probabilities at several batch sizes; the results of Jacobi decoding."""
    results = []
    for batch_size in (1, 3, 64):
        greedy, jacobi = (
            generate_masks(
                model,
                prompts,
                sequence=sequence,
                options=DecodingOptions(method=method, dtype="float32", batch_size=batch_size, **fields),
                pixel_values=images,
            )
            for method in ("greedy", "jacobi")
        )
        np.testing.assert_array_equal(jacobi.codes, greedy.codes)
        np.testing.assert_allclose(jacobi.logprob, greedy.logprob, atol=3e-5)
        if fields.get("readout") == "expected":
            np.testing.assert_allclose(jacobi.probability, greedy.probability, atol=3e-5)
        assert jacobi.steps <= greedy.steps + 1
        results.append(jacobi)
    return results


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["ntpseg", "emu3"])
def test_a_model_without_drafts(layout: str, k: int) -> None:
    sequence = sequence_format(layout)
    model = make_model(sequence, k=k)
    assert draft_source(model.config) is None
    results = assert_greedy(model, sequence, make_prompts(sequence, 7))
    # Some tokens are drafted right and some are not, or this would test only half of the rule.
    assert 2 < results[0].steps < sequence.mask_cells - 1


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_other_families(family: str) -> None:
    sequence = sequence_format()
    assert_greedy(make_model(sequence, family), sequence, make_prompts(sequence, 7))


@pytest.mark.parametrize("draft", ["stem", "blanks", None])
@pytest.mark.parametrize(
    ("front_end", "aligned", "prefix_lm"),
    [("features", True, False), ("features", True, True), ("features", False, False), ("both", True, True)],
)
def test_drafts_of_the_model(front_end: str, aligned: bool, prefix_lm: bool, draft: Any) -> None:
    sequence = feature_format(front_end, aligned)
    options: dict[str, Any] = {"mask_inputs": None} if draft is None else {}
    if draft == "stem":
        options["dense_loss"] = {"pixel": 1.0}
    model = make_feature_model(sequence, front_end=front_end, aligned=aligned, prefix_lm=prefix_lm, k=2, **options)
    assert draft_source(model.config) == draft
    assert_greedy(model, sequence, make_prompts(sequence, 6), make_images(6), readout="expected")


def test_rows_that_finish_at_different_times() -> None:
    """Over many masks every row ends on its own, the others go on."""
    sequence = feature_format()
    model = make_feature_model(sequence)
    prompts, images = make_prompts(sequence, 16), make_images(16)
    one, _, many = assert_greedy(model, sequence, prompts, images)
    # At batch 1 the mean over the masks, in one batch those of the slowest.
    assert one.steps < many.steps


def test_one_pass_verifies_a_right_draft() -> None:
    sequence = feature_format()
    model = make_feature_model(sequence)
    with torch.no_grad():
        model.heads.weight.zero_()
    # Every code is as likely as any other, and the lowest wins: the blanks' draft is right.
    results = assert_greedy(model, sequence, make_prompts(sequence, 3), make_images(3))
    assert [result.steps for result in results] == [2, 2, 2]


def test_half_precision_stays_close() -> None:
    sequence = sequence_format()
    model, prompts = make_model(sequence), make_prompts(sequence, 6)
    exact, rounded = (
        generate_masks(model, prompts, sequence=sequence, options=DecodingOptions(method="jacobi", dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    for a, b, p, q in zip(exact.codes, rounded.codes, exact.logprob, rounded.logprob, strict=True):
        same = np.cumprod(a.ravel() == b.ravel()).astype(bool)
        assert same[0]
        np.testing.assert_allclose(p[same], q[same], atol=0.1)


def test_output_that_is_not_finite_ends() -> None:
    sequence = feature_format()
    model = make_feature_model(sequence)
    with torch.no_grad():
        model.heads.weight[sequence.vocabulary.mask_range[0]] = torch.nan
    with pytest.raises(NonFiniteOutput):
        generate_masks(
            model,
            make_prompts(sequence, 2),
            sequence=sequence,
            options=DecodingOptions(method="jacobi"),
            pixel_values=make_images(2),
        )


def test_copied_cells() -> None:
    codes = torch.arange(100, 112).expand(12, -1).contiguous()
    known = torch.arange(1, 13)
    expected = codes.clone()
    for row in range(12):
        for cell in range(row + 1, 12):
            expected[row, cell] = expected[row, cell - 4] if cell >= 4 else expected[row, cell - 1]
    assert torch.equal(copy_cells(codes, known, 4), expected)


@pytest.mark.parametrize("prefix_lm", [False, True])
def test_ragged_passes_equal_tokens_one_by_one(prefix_lm: bool) -> None:
    sequence = feature_format()
    model = make_feature_model(sequence, prefix_lm=prefix_lm)
    prompts = [torch.from_numpy(prompt) for prompt in make_prompts(sequence, 3)]
    cells = torch.from_numpy(sequence.target_grid_ids)
    low = sequence.vocabulary.mask_range[0]
    tokens = torch.randint(low, low + 24, (3, 9), generator=torch.Generator().manual_seed(0))
    grid_ids = cells[:9].expand(3, -1)
    with torch.inference_mode():
        pad = torch.nn.utils.rnn.pad_sequence
        stem = model.encode_image(torch.from_numpy(make_images(3)), pad(prompts, True, sequence.vocabulary.pad))
        batch = PromptBatch(prompts, [torch.zeros_like(prompt) for prompt in prompts], stem)
        decoder = NativeDecoder(model, torch.float32)
        one = [decoder.start(batch, 40)]
        one += [decoder.extend(tokens[:, i : i + 1], grid_ids[:, i : i + 1])[:, 0] for i in range(9)]
        expected = torch.stack(one, 1)
        torch.testing.assert_close(decoder.start_with(batch, 40, tokens, grid_ids), expected, atol=1e-5, rtol=1e-5)
        # From places 3, 9 and 5 to places 7, 9 and 9, after others that are taken back.
        decoder.rewind(torch.tensor([6, 0, 4]))
        flat = torch.cat([tokens[0, 3:7], tokens[2, 5:9]])
        hidden = decoder.extend_ragged([4, 0, 4], flat, torch.cat([cells[3:7], cells[5:9]]))
        torch.testing.assert_close(hidden, torch.cat([expected[0, 4:8], expected[2, 6:]]), atol=1e-5, rtol=1e-5)
        flat = torch.cat([tokens[0, 7:8], tokens[2, 8:9]])
        decoder.rewind(torch.tensor([0, 0, 1]))
        hidden = decoder.extend_ragged([1, 0, 1], flat, torch.cat([cells[7:8], cells[8:9]]))
        torch.testing.assert_close(hidden, torch.stack([expected[0, 8], expected[2, 9]]), atol=1e-5, rtol=1e-5)
        # Rows of different lengths, and different numbers of tokens.
        decoder.rewind(torch.tensor([3, 4, 9]))
        flat = torch.cat([tokens[0, 5:7], tokens[1, 5:9], tokens[2, :1]])
        hidden = decoder.extend_ragged([2, 4, 1], flat, torch.cat([cells[5:7], cells[5:9], cells[:1]]))
        wanted = torch.cat([expected[0, 6:8], expected[1, 6:10], expected[2, 1:2]])
        torch.testing.assert_close(hidden, wanted, atol=1e-5, rtol=1e-5)
