"""Decoding: our path against Hugging Face's and against plain forwards, batching, layouts, options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import make_model, make_prompts, sequence_format

from ntpseg.generation import DecodingOptions, generate_masks


@pytest.fixture
def sequence() -> Any:
    return sequence_format()


def by_definition(model: Any, sequence: Any, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Greedy decoding from the definition: the whole sequence is read anew for every token, without any cache."""
    low, high = sequence.vocabulary.mask_range
    ids, scores = list(prompt), []
    for index in range(sequence.num_target):
        token = sequence.forced(index)
        if token is None:
            with torch.no_grad():
                grid = torch.as_tensor(sequence.grid_ids(np.array(ids)))[None]
                hidden = model(torch.tensor(ids)[None], grid_ids=grid).last_hidden_state[0, -1]
                logprob = (model.heads.weight[low:high] @ hidden).log_softmax(0)
            token = low + int(logprob.argmax())
            scores.append(float(logprob.max()))
        ids.append(token)
    return sequence.parse(np.array(ids[len(prompt) :])), np.array(scores)


@pytest.mark.parametrize("layout", ["ntpseg", "emu3"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_both_paths_equal_the_definition(family: str, layout: str) -> None:
    sequence = sequence_format(layout)
    model, prompts = make_model(sequence, family), make_prompts(sequence, 5)
    expected = [by_definition(model, sequence, p) for p in prompts]
    assert len({codes.tobytes() for codes, _ in expected}) > 1
    for decoder in ("native", "huggingface"):
        options = DecodingOptions(decoder=decoder, dtype="float32", batch_size=4)  # type: ignore[arg-type]
        result = generate_masks(model, prompts, sequence=sequence, options=options)
        np.testing.assert_array_equal(result.codes, np.stack([codes for codes, _ in expected]))
        np.testing.assert_allclose(result.logprob, np.stack([scores for _, scores in expected]), atol=2e-5)


@pytest.mark.parametrize("decoder", ["native", "huggingface"])
def test_a_result_does_not_depend_on_its_batch(sequence: Any, decoder: Any) -> None:
    model, prompts = make_model(sequence), make_prompts(sequence, 9)
    results = [
        generate_masks(
            model,
            prompts,
            sequence=sequence,
            options=DecodingOptions(decoder=decoder, batch_size=size, dtype="float32"),
        )
        for size in (1, 4, 64)
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].codes, other.codes)
        np.testing.assert_allclose(results[0].logprob, other.logprob, atol=2e-5)


@pytest.mark.parametrize("layout", ["ntpseg", "emu3"])
@pytest.mark.parametrize("k", [2, 4])
def test_speculation_equals_greedy(layout: str, k: int) -> None:
    sequence = sequence_format(layout)
    model, prompts = make_model(sequence, k=k), make_prompts(sequence, 7)
    greedy = generate_masks(model, prompts, sequence=sequence, options=DecodingOptions(dtype="float32"))
    for batch_size in (1, 7):
        options = DecodingOptions(method="speculative", dtype="float32", batch_size=batch_size)
        result = generate_masks(model, prompts, sequence=sequence, options=options)
        np.testing.assert_array_equal(greedy.codes, result.codes)
        np.testing.assert_allclose(greedy.logprob, result.logprob, atol=2e-5)
        if batch_size == 1:
            # Some drafts are accepted and some are not, or this would test only half of the rule.
            assert greedy.steps / k < result.steps < greedy.steps


def test_speculation_takes_k_tokens_a_step_when_every_draft_is_right(sequence: Any) -> None:
    model, prompts = make_model(sequence, k=4), make_prompts(sequence, 3)
    with torch.no_grad():
        # A model that always says code 7: all drafts are right, and 12 tokens take (12 - 1) / 4 steps.
        model.heads.transform_weight.zero_()
        model.heads.transform_bias.zero_()
        model.backbone.norm.weight.fill_(0.0)
        model.heads.weight.zero_()
    result = generate_masks(model, prompts, sequence=sequence, options=DecodingOptions(method="speculative"))
    assert (result.codes == 0).all()
    assert result.steps == 3


def test_codes_are_restricted_to_the_mask_and_confidence_is_a_probability(sequence: Any) -> None:
    model, prompts = make_model(sequence), make_prompts(sequence, 4)
    with torch.no_grad():
        # Text ids that outweigh every mask code must not matter.
        model.heads.weight[: sequence.vocabulary.text_size] *= 50
    result = generate_masks(model, prompts, sequence=sequence)
    assert result.codes.shape == (4, *sequence.mask_grid)
    assert result.codes.min() >= 0 and result.codes.max() < sequence.vocabulary.mask_codes
    assert ((result.confidence >= 1 / sequence.vocabulary.mask_codes - 1e-6) & (result.confidence <= 1)).all()
    assert result.tokens_per_second > 0


def test_bfloat16_stays_close_to_float32(sequence: Any) -> None:
    model, prompts = make_model(sequence), make_prompts(sequence, 6)
    exact, rounded = (
        generate_masks(model, prompts, sequence=sequence, options=DecodingOptions(dtype=dtype))  # type: ignore[arg-type]
        for dtype in ("float32", "bfloat16")
    )
    # Until its first different token a row has seen the same input.
    for a, b, p, q in zip(exact.codes, rounded.codes, exact.logprob, rounded.logprob, strict=True):
        same = np.cumprod(a.ravel() == b.ravel()).astype(bool)
        assert same[0]
        np.testing.assert_allclose(p[same], q[same], atol=0.1)


def test_training_mode_is_restored_and_no_gradient_is_kept(sequence: Any) -> None:
    model, prompts = make_model(sequence).train(), make_prompts(sequence, 2)
    generate_masks(model, prompts, sequence=sequence)
    assert model.training
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())
    before = generate_masks(model, prompts, sequence=sequence).codes
    with torch.no_grad():
        model.heads.weight.copy_(torch.randn_like(model.heads.weight))
    assert (generate_masks(model, prompts, sequence=sequence).codes != before).any()


def test_progress_counts_every_prompt(sequence: Any) -> None:
    model, seen = make_model(sequence), []
    generate_masks(
        model,
        make_prompts(sequence, 5),
        sequence=sequence,
        options=DecodingOptions(batch_size=2),
        progress=seen.append,
    )
    assert seen == [2, 2, 1]


def test_what_our_path_does_not_cover_runs_on_hugging_faces(sequence: Any) -> None:
    # A window longer than the sequence changes nothing but the path.
    model, prompts = make_model(sequence, "qwen2-window"), make_prompts(sequence, 3)
    expected = generate_masks(make_model(sequence, "qwen2"), prompts, sequence=sequence).codes
    np.testing.assert_array_equal(generate_masks(model, prompts, sequence=sequence).codes, expected)
    with pytest.raises(ValueError, match=r"native.*sliding_attention"):
        generate_masks(model, prompts, sequence=sequence, options=DecodingOptions(decoder="native"))


def test_wrong_input_is_named(sequence: Any) -> None:
    model = make_model(sequence)
    with pytest.raises(ValueError, match="prompts must hold at least one prompt"):
        generate_masks(model, [], sequence=sequence)
    with pytest.raises(ValueError, match="sequence must be"):
        generate_masks(model, make_prompts(sequence, 1))
    with pytest.raises(ValueError, match=r"must have at least 2 heads .* got 1"):
        generate_masks(
            model, make_prompts(sequence, 1), sequence=sequence, options=DecodingOptions(method="speculative")
        )
    for prompt in (np.zeros((2, 2), np.int64), np.zeros(3), np.zeros(0, np.int64)):
        with pytest.raises(ValueError, match=r"^prompts must be int64 \[P\] each, P >= 1, got .* at 1$"):
            generate_masks(model, [*make_prompts(sequence, 1), prompt], sequence=sequence)
    for token in (-1, sequence.vocabulary.size):
        with pytest.raises(ValueError, match=r"^prompts must hold ids within \[0, \d+\), got"):
            generate_masks(model, [np.array([token, 3])], sequence=sequence)
    for temperature in (0, -1.0, float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match=rf"^temperature must be a number > 0, got {temperature}"):
            DecodingOptions(temperature=temperature)
    with pytest.raises(ValueError, match=r"^mirror must be True or False, got 1"):
        DecodingOptions(mirror=1)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        DecodingOptions(batch_size=0)
    with pytest.raises(
        ValueError, match="method must be one of greedy, speculative, jacobi, expected, refine, sample, got 'beam'"
    ):
        DecodingOptions(method="beam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"decoder must be native or auto .* got 'huggingface'"):
        DecodingOptions(method="speculative", decoder="huggingface")
