"""Decoding of models with a stem and of prefix language models, against plain forwards without any cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import (
    feature_format,
    full_hidden,
    make_feature_model,
    make_images,
    make_model,
    make_prompts,
    mask_logits,
    sequence_format,
)

from ntpseg.generation import DecodingOptions, generate_masks
from ntpseg.generation.generate import MaskGenerator
from ntpseg.losses.dense import from_patches

# Every front end, aligned and not, with and without the prefix mask; both families of supported backbones.
CASES = [
    (family, front_end, aligned, prefix)
    for family in ("qwen3", "llama")
    for front_end, aligned in (("features", True), ("features", False), ("both", True), ("both", False))
    for prefix in (False, True)
] + [("qwen3", "codes", True, True)]


def options(**fields: Any) -> DecodingOptions:
    return DecodingOptions(dtype="float32", **fields)


@pytest.mark.parametrize("decoder", ["native", "huggingface"])
@pytest.mark.parametrize(("family", "front_end", "aligned", "prefix"), CASES)
def test_cached_decoding_equals_full_forwards(
    family: str, front_end: str, aligned: bool, prefix: bool, decoder: Any
) -> None:
    sequence = feature_format("both" if front_end == "codes" else front_end, aligned)
    model = make_feature_model(sequence, family, front_end, aligned=aligned, prefix_lm=prefix)
    prompts, low = make_prompts(sequence, 4), sequence.vocabulary.mask_range[0]
    images = None if front_end == "codes" else make_images(4)
    settings = options(method="greedy", readout="expected", decoder=decoder, batch_size=3)
    result = generate_masks(model, prompts, sequence=sequence, options=settings, pixel_values=images)
    assert len({codes.tobytes() for codes in result.codes}) > 1
    for row, prompt in enumerate(prompts):
        tokens = result.codes[row].ravel() + low
        hidden = full_hidden(model, sequence, prompt, tokens[:-1], None if images is None else images[row])
        logits = mask_logits(model, hidden)
        np.testing.assert_array_equal(result.codes[row].ravel(), logits.argmax(-1))
        np.testing.assert_allclose(result.logprob[row], logits.log_softmax(-1).amax(-1), atol=2e-5)
        patches = logits.softmax(-1) @ model.readout.patches
        np.testing.assert_allclose(result.probability[row], from_patches(patches[None], (4, 4))[0], atol=2e-5)


@pytest.mark.parametrize("decoder", ["native", "huggingface"])
@pytest.mark.parametrize("prefix", [False, True])
def test_hidden_states_of_several_tokens_at_once(decoder: Any, prefix: bool) -> None:
    """The pass over a whole mask that refinement makes, in one batch of prompts of different lengths."""
    from ntpseg.generation.decoder import read_mask

    sequence = feature_format("both")
    model = make_feature_model(sequence, front_end="both", prefix_lm=prefix)
    prompts, images = make_prompts(sequence, 4), make_images(4)
    generator = MaskGenerator(model, sequence, options(decoder=decoder))
    low, high = sequence.vocabulary.mask_range
    codes = torch.randint(high - low, (4, 16))
    for read in (codes, None):
        with torch.no_grad():
            hidden = read_mask(generator.decoder, generator.target, generator._batch(prompts, images), read)
        for row in range(4):
            tokens = (codes[row] + low).tolist() if read is not None else [sequence.vocabulary.pad] * 16
            expected = full_hidden(model, sequence, prompts[row], tokens[:-1], images[row])
            torch.testing.assert_close(hidden[row], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("readout", ["codes", "expected"])
def test_speculation_equals_greedy_with_features(readout: Any) -> None:
    """Codes, scores and, where they are asked for, the expected patches of what was accepted."""
    sequence = feature_format("features")
    model = make_feature_model(sequence, k=3, prefix_lm=True)
    prompts, images = make_prompts(sequence, 5), make_images(5)
    greedy, quick = (
        generate_masks(
            model, prompts, sequence=sequence, options=options(method=method, readout=readout), pixel_values=images
        )
        for method in ("greedy", "speculative")
    )
    np.testing.assert_array_equal(greedy.codes, quick.codes)
    np.testing.assert_allclose(greedy.logprob, quick.logprob, atol=2e-5)
    assert quick.steps < greedy.steps
    if readout == "expected":
        np.testing.assert_allclose(greedy.probability, quick.probability, atol=2e-5)
    else:
        assert greedy.probability is None and quick.probability is None


def test_the_image_reaches_only_its_own_prompt() -> None:
    sequence = feature_format()
    model, prompts, images = make_feature_model(sequence), make_prompts(sequence, 3), make_images(3)
    settings = options(readout="expected")
    before = generate_masks(model, prompts, sequence=sequence, options=settings, pixel_values=images).probability
    changed = images.copy()
    changed[1] *= -1
    after = generate_masks(model, prompts, sequence=sequence, options=settings, pixel_values=changed).probability
    np.testing.assert_allclose(before[[0, 2]], after[[0, 2]], atol=1e-6)
    assert np.abs(before[1] - after[1]).max() > 1e-3


def test_wrong_input_is_named() -> None:
    sequence = feature_format()
    model, prompts = make_feature_model(sequence), make_prompts(sequence, 2)
    for images, count in ((None, 0), (make_images(1), 1)):
        with pytest.raises(ValueError, match=f"pixel_values must hold an image for each of 2 prompts, got {count}"):
            generate_masks(model, prompts, sequence=sequence, pixel_values=images)
    with pytest.raises(ValueError, match=r"pixel_values must be \[2, 1, 16, 16\], got \[2, 1, 8, 8\]"):
        generate_masks(model, prompts, sequence=sequence, pixel_values=make_images(2, 8))
    unblanked = make_feature_model(sequence, mask_inputs={"blank": 0.0})
    for other in (unblanked, make_feature_model(sequence, mask_inputs=None)):
        with pytest.raises(ValueError, match=r"trained on blank mask tokens .* method 'refine', got mask_inputs"):
            MaskGenerator(other, sequence, DecodingOptions(method="refine"))
    plain = make_model(sequence_format())
    for fields in (
        {"method": "expected"},
        {"method": "sample", "readout": "expected"},
        {"method": "greedy", "readout": "expected"},
    ):
        with pytest.raises(ValueError, match=r"must have a read-out of expected patches .* got none"):
            MaskGenerator(plain, sequence_format(), DecodingOptions(**fields))
    for fields, message in (
        ({"passes": -1}, "passes must be an integer >= 0, got -1"),
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be a number > 0, got 0.0"),
        ({"threshold": 1.0}, "threshold must be a number > 0 and < 1, got 1.0"),
        ({"readout": "mean"}, "readout must be one of auto, codes, expected, got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            DecodingOptions(**fields)
