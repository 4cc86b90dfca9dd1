"""Probability, its calibration and its uncertainty: values by hand, and what a `Segmenter` returns of each read-out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_readout_and_mirror import feature_bundle
from tiny_segmenter import SIDE, TEXTS, shared

from ntpseg.data import resize_mask
from ntpseg.generation import DecodingOptions, Segmenter
from ntpseg.generation.calibration import CLIP, calibrate, pixel_logit
from ntpseg.generation.uncertainty import pairwise_dice, pixel_entropy


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (SIDE, SIDE)).astype(np.uint8) for _ in range(3)]


def test_entropy_is_in_bits() -> None:
    found = pixel_entropy(np.array([[0.0, 0.5, 1.0], [0.25, 0.75, 0.11]], np.float32))
    np.testing.assert_allclose(found, [[0, 1, 0], [0.8112781, 0.8112781, 0.4999]], atol=1e-4)
    assert found.dtype == np.float32


def test_dice_between_samples() -> None:
    masks = np.zeros((3, 2, 4), bool)
    masks[0, 0] = masks[1, 0, :2] = True
    # 2 * 2 / 6, and twice 0 against the empty one.
    assert pairwise_dice(masks) == pytest.approx(2 / 9)
    assert pairwise_dice(masks[[2, 2]]) == pairwise_dice(masks[[0, 0, 0]]) == 1
    with pytest.raises(ValueError, match="masks must be at least two, got 1"):
        pairwise_dice(masks[:1])


def test_calibration_divides_the_logit() -> None:
    p = np.array([0.0, 0.01, 0.2, 0.5, 0.9, 1.0], np.float32)
    assert np.array_equal(calibrate(p, 1), p)
    halved = calibrate(p, 2)
    odds = np.sqrt(p[1:5] / (1 - p[1:5]))
    np.testing.assert_allclose(halved[1:5], odds / (1 + odds), rtol=1e-6)
    assert halved[3] == 0.5 and (np.diff(halved) > 0).all() and halved.dtype == np.float32
    # The ends count as CLIP and 1 - CLIP.
    np.testing.assert_allclose(halved[[0, 5]], [np.sqrt(CLIP), 1 - np.sqrt(CLIP)], rtol=1e-2)
    np.testing.assert_allclose(calibrate(halved, 0.5)[1:5], p[1:5], rtol=1e-5)
    assert np.isfinite(pixel_logit(p)).all()


@pytest.mark.parametrize("which", ["codes", "features", "both"])
@pytest.mark.parametrize("readout", ["auto", "codes"])
def test_samples_give_the_probability_and_its_spread(which: str, readout: Any, images: list[np.ndarray]) -> None:
    """The tokens' own model has no read-out: its samples go through the codebook's decoder."""
    bundle = shared()[1] if which == "codes" else feature_bundle(which)
    options = DecodingOptions(method="sample", samples=4, readout=readout, dtype="float32", temperature=2.0)
    segmenter = Segmenter(bundle, options)
    together = list(segmenter.segment_all(images, list(TEXTS)))
    for image, text, prediction in zip(images, TEXTS, together):
        samples = prediction.samples
        assert samples is not None and samples.shape == (4, SIDE, SIDE) and len(np.unique(samples, axis=0)) > 1
        np.testing.assert_allclose(prediction.deviation, np.std(samples, axis=0, ddof=1), atol=1e-6)
        pairs = [(a, b) for a in range(4) for b in range(a)]
        dice = [
            2 * (samples[a] >= 0.5)[samples[b] >= 0.5].sum() / max(1, (samples[[a, b]] >= 0.5).sum())
            if (samples[[a, b]] >= 0.5).any()
            else 1.0
            for a, b in pairs
        ]
        assert prediction.sample_dice == pytest.approx(np.mean(dice), abs=1e-6)
        np.testing.assert_array_equal(prediction.entropy, pixel_entropy(prediction.probability))
        mean = np.abs(prediction.probability - samples.mean(0)).max()
        # Expected patches are the same mean with less noise.
        assert (mean < 1e-6) == (readout == "codes" or which == "codes")
        alone = segmenter.segment(image, text)
        np.testing.assert_array_equal(alone.samples, samples)
        np.testing.assert_allclose(alone.probability, prediction.probability, atol=2e-6)


def test_one_sample_has_no_spread(images: list[np.ndarray]) -> None:
    one = Segmenter(shared()[1], DecodingOptions(method="sample", samples=1)).segment(images[0], TEXTS[0])
    assert one.samples is not None and one.deviation is None and one.sample_dice is None
    greedy = Segmenter(shared()[1]).segment(images[0], TEXTS[0])
    assert greedy.samples is None and greedy.deviation is None and greedy.sample_dice is None
    assert greedy.entropy.shape == (SIDE, SIDE)


@pytest.mark.parametrize("method", ["greedy", "refine", "sample"])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_a_temperature_changes_the_probability_and_no_mask(
    method: str, threshold: float, images: list[np.ndarray]
) -> None:
    plain = DecodingOptions(method=method, threshold=threshold, mirror=True, dtype="float32")
    bundle = feature_bundle()
    image = np.repeat(images[0], 3, 1)
    before = Segmenter(bundle, plain).segment(image, TEXTS[0])
    after = Segmenter(bundle, replace(plain, calibration_temperature=3.0)).segment(image, TEXTS[0])
    np.testing.assert_array_equal(after.mask, before.mask)
    np.testing.assert_allclose(after.probability, calibrate(before.probability, 3.0), atol=1e-6)
    assert np.abs(after.probability - before.probability).max() > 1e-3
    np.testing.assert_array_equal(before.mask, resize_mask(before.probability, *image.shape, threshold=threshold))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.0}, "top_p must be a number > 0 and <= 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be a number > 0 and <= 1, got 1.5"),
        ({"calibration_temperature": 0}, "calibration_temperature must be a number > 0, got 0"),
        ({"calibration_temperature": float("nan")}, "calibration_temperature must be a number > 0, got nan"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        DecodingOptions(**fields)
