"""Tokens while they are decoded: whole, in order, and those of the result that nobody watches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_decoders import feature_format, make_feature_model, make_images, make_prompts
from tiny_segmenter import TEXTS, shared

from ntpseg.generation import METHODS, DecodedTokens, DecodingOptions, MaskGenerator, Segmenter


def setup(method: str) -> tuple[MaskGenerator, Any, Any]:
    sequence = feature_format("both")
    model = make_feature_model(sequence, front_end="both", prefix_lm=True, k=2)
    options = DecodingOptions(method=method, dtype="float32", batch_size=2, samples=2, readout="expected")
    return MaskGenerator(model, sequence, options), make_prompts(sequence, 3), make_images(3)


@pytest.mark.parametrize("method", METHODS)
def test_the_tokens_told_are_those_of_the_result(method: str) -> None:
    generator, prompts, images = setup(method)
    told: list[DecodedTokens] = []
    watched = generator(prompts, pixel_values=images, listener=told.append)
    unwatched = generator(prompts, pixel_values=images)
    np.testing.assert_array_equal(watched.codes, unwatched.codes)
    np.testing.assert_array_equal(watched.logprob, unwatched.logprob)
    np.testing.assert_array_equal(watched.probability, unwatched.probability)
    assert watched.steps == unwatched.steps
    for prompt in range(3):
        own = [tokens for tokens in told if tokens.prompt == prompt]
        assert [tokens.first for tokens in own] == [sum(len(t.codes) for t in own[:i]) for i in range(len(own))]
        np.testing.assert_array_equal(np.concatenate([t.codes for t in own]), watched.codes[prompt].ravel())
        np.testing.assert_array_equal(np.concatenate([t.logprob for t in own]), watched.logprob[prompt])
        patches = np.concatenate([t.patches for t in own if t.patches is not None])
        grid = patches.reshape(4, 4, 4, 4).transpose(0, 2, 1, 3).reshape(16, 16)
        np.testing.assert_array_equal(grid, watched.probability[prompt])  # type: ignore[index]
        # One pass has nothing to tell before its end; the others tell token by token.
        assert (len(own) > 1) == METHODS[method].streams


@pytest.mark.parametrize("method", ["greedy", "expected", "speculative"])
def test_tokens_are_told_before_the_next_is_decoded(method: str) -> None:
    """What the listener raises ends decoding there: the decoder has not read on."""
    generator, prompts, images = setup(method)
    generator.model.train()
    reads = 0
    extend = generator.decoder.extend

    def counted(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        return extend(*arguments)

    generator.decoder.extend = counted  # type: ignore[method-assign]

    class Stopped(Exception):
        pass

    def stop(tokens: DecodedTokens) -> None:
        if tokens.first + len(tokens.codes) > 3:
            raise Stopped

    with pytest.raises(Stopped):
        generator(prompts[:1], pixel_values=images[:1], listener=stop)
    assert 0 < reads <= 5
    assert generator.model.training, "decoding that ends early must leave the model as it was"


def test_segment_tells_its_tokens() -> None:
    records, bundle, _ = shared()
    segmenter = Segmenter(bundle, DecodingOptions(dtype="float32"))
    told: list[DecodedTokens] = []
    watched = segmenter.segment(records[0].image, TEXTS[0], told.append)
    unwatched = segmenter.segment(records[0].image, TEXTS[0])
    np.testing.assert_array_equal(watched.mask, unwatched.mask)
    np.testing.assert_array_equal(np.concatenate([t.codes for t in told]), unwatched.codes.ravel())
    assert [t.first for t in told] == list(range(unwatched.codes.size))
