"""Decoding in fixed memory: the same masks, no new memory, and nothing left behind by another batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import feature_format, make_feature_model, make_images, make_model, make_prompts, sequence_format

from ntpseg.generation import DecodingOptions, MaskGenerator
from ntpseg.generation.native import NativeDecoder
from ntpseg.generation.static_step import StaticStep


def make_generator(front_end: str = "features", method: str = "greedy", static: bool = False) -> MaskGenerator:
    sequence = sequence_format("emu3") if front_end == "emu3" else feature_format(front_end)
    model = make_model(sequence) if front_end == "emu3" else make_feature_model(sequence, front_end=front_end)
    samples = {"samples": 4} if method == "sample" else {}
    options = DecodingOptions(method=method, dtype="float32", batch_size=4, **samples)
    generator = MaskGenerator(model, sequence, options)
    generator.decoder = NativeDecoder(model, torch.float32, static=static)
    return generator


def addresses(decoder: Any) -> list[int]:
    held = [layer.memory.buffer for layer in decoder.layers]
    held += [decoder.cos, decoder.sin, decoder.feature_memory]
    for step in decoder.steps.values():
        held += [step.tokens, step.grid_ids, step.positions, step.output]
    return [tensor.data_ptr() for tensor in held]


@pytest.mark.parametrize("method", ["greedy", "expected", "jacobi", "sample"])
@pytest.mark.parametrize("front_end", ["features", "both"])
def test_fixed_memory_gives_the_same_masks(front_end: str, method: str) -> None:
    plain, static = (make_generator(front_end, method, static) for static in (False, True))
    prompts, images = make_prompts(plain.sequence, 10), make_images(10)
    # Of 10 prompts the last batch is smaller; the second call finds memory that was used.
    for _ in range(2):
        expected, found = (generator(prompts, pixel_values=images) for generator in (plain, static))
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_allclose(found.logprob, expected.logprob, atol=2e-5)
    steps = {"jacobi": set(), "sample": {4}}.get(method, {4, 2})
    assert set(static.decoder.steps) == steps  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_samples_of_one_image_after_another(rows: int) -> None:
    """Each call repeats its rows to the same number, whose step must not read an earlier image."""
    plain, static = (make_generator("features", "sample", static) for static in (False, True))
    prompts, images = make_prompts(plain.sequence, 4), make_images(4)
    places = []
    for first in range(0, 4, rows):
        chosen = slice(first, first + rows)
        expected, found = (g(prompts[chosen], pixel_values=images[chosen]) for g in (plain, static))
        np.testing.assert_array_equal(found.samples, expected.samples)
        np.testing.assert_allclose(found.probability, expected.probability, atol=2e-5)
        # A CUDA graph reads and writes the memory that it was captured with.
        places.append([layer.cache.buffer.data_ptr() for layer in static.decoder.layers])  # type: ignore[attr-defined]
    assert places == [places[0]] * len(places)


def test_steps_of_one_and_of_several_tokens() -> None:
    """At a row's end the layout of Emu3 reads two tokens, which the step in fixed memory leaves to the other path."""
    plain, static = (make_generator("emu3", static=static) for static in (False, True))
    prompts = make_prompts(plain.sequence, 5)
    np.testing.assert_array_equal(static(prompts).codes, plain(prompts).codes)


def test_memory_is_reserved_once() -> None:
    generator = make_generator(static=True)
    prompts, images = make_prompts(generator.sequence, 8), make_images(8)
    generator(prompts, pixel_values=images)
    before = addresses(generator.decoder)
    calls = []
    # A smaller batch of shorter prompts, and the first one again.
    for chosen in (slice(0, 4), slice(2, 8), slice(0, 8)):
        calls.append(generator(prompts[chosen], pixel_values=images[chosen]))
        assert addresses(generator.decoder)[: len(before)] == before
    assert generator.decoder.capacity % 32 == 0  # type: ignore[attr-defined]


def test_memory_grows_and_the_steps_are_made_anew() -> None:
    generator, fresh = make_generator(static=True), make_generator(static=True)
    long = make_prompts(generator.sequence, 4, lengths=(40, 50))
    short, images = make_prompts(generator.sequence, 2), make_images(4)
    generator(short, pixel_values=images[:2])
    assert set(generator.decoder.steps) == {2}  # type: ignore[attr-defined]
    np.testing.assert_array_equal(generator(long, pixel_values=images).codes, fresh(long, pixel_values=images).codes)
    assert set(generator.decoder.steps) == {4}  # type: ignore[attr-defined]


@pytest.mark.parametrize("static", [False, True])
def test_a_batch_leaves_nothing_behind(static: bool) -> None:
    generator = make_generator(static=static)
    prompts, images = make_prompts(generator.sequence, 3), make_images(3)
    expected = generator(prompts, pixel_values=images)
    for layer in generator.decoder.layers:  # type: ignore[attr-defined]
        layer.memory.buffer.fill_(torch.nan)
    found = generator(prompts, pixel_values=images)
    np.testing.assert_array_equal(found.logprob, expected.logprob)


@pytest.mark.gpu
def test_a_graph_is_captured_once_and_replayed() -> None:
    weight, calls = torch.randn(5, 5, device="cuda"), []

    def function(tokens: torch.Tensor, grid_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return (tokens + 10 * grid_ids + 100 * positions[:, None])[..., None] * weight[0]

    step = StaticStep(function, 3, torch.device("cuda"))
    for n in range(5):
        tokens = torch.full((3, 1), n, device="cuda")
        found = step(tokens, tokens + 1, tokens[:, 0] + 2)
        torch.testing.assert_close(found, (n + 10 * (n + 1) + 100 * (n + 2)) * weight[0].expand(3, 1, 5))
    assert len(calls) == 3, "two warm-ups and the capture"


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["greedy", "jacobi"])
def test_on_a_gpu_graphs_give_the_masks_of_the_cpu(method: str) -> None:
    generator = make_generator(method=method)
    prompts, images = make_prompts(generator.sequence, 10), make_images(10)
    expected = generator(prompts, pixel_values=images)
    moved = MaskGenerator(generator.model.cuda(), generator.sequence, generator.options)  # type: ignore[arg-type]
    assert moved.decoder.static  # type: ignore[attr-defined]
    for _ in range(2):
        np.testing.assert_array_equal(moved(prompts, pixel_values=images).codes, expected.codes)
