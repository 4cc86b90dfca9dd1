"""`Segmenter` with a stem: mirror, threshold and read-out, on a bundle with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import make_feature_model
from tiny_segmenter import SIDE, TEXTS, shared

from ntpseg.data import prepare, resize_mask, swap_laterality
from ntpseg.generation import DecodingOptions, Segmenter
from ntpseg.models import Bundle
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary


def feature_bundle(front_end: str = "features", aligned: bool = True) -> Bundle:
    """The shared tokenizers under an untrained model with a stem."""
    _, trained, _ = shared()
    vision = trained.vision
    codes = 32 if front_end == "both" else 0 if aligned else 1
    vocabulary = Vocabulary(len(trained.text), codes, 24)
    sequence = SequenceFormat(vocabulary, vision.image_grid if codes else None, vision.mask_grid)
    model = make_feature_model(
        sequence,
        front_end=front_end,
        image_size=vision.image_size,
        patch_size=vision.factor,
        stem={"patch": vision.factor // 2, "widths": [8], "group_size": 4, "caption_dim": 8, "aligned": aligned},
        k=2,
    )
    return Bundle(model, trained.text, vision, sequence)


@pytest.fixture
def image() -> np.ndarray:
    """Of the model's own size, so that nothing is resized."""
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE)).astype(np.uint8)


@pytest.mark.parametrize(
    ("which", "readout"),
    [
        ("codes", "codes"),
        *((which, readout) for which in ("features", "features apart", "both") for readout in ("codes", "expected")),
    ],
)
def test_mirror_is_the_mean_of_two_calls(which: str, readout: Any, image: np.ndarray) -> None:
    bundle = shared()[1]
    if which != "codes":
        bundle = feature_bundle(which.split()[0], aligned=which != "features apart")
    text = TEXTS[0]
    assert swap_laterality(text) == TEXTS[1]
    options = DecodingOptions(dtype="float32", readout=readout)
    plain = Segmenter(bundle, options)
    one, two = plain.segment(image, text), plain.segment(image[:, ::-1].copy(), TEXTS[1])
    both = Segmenter(bundle, replace(options, mirror=True)).segment(image, text)
    np.testing.assert_allclose(both.probability, (one.probability + two.probability[:, ::-1]) / 2, atol=1e-6)
    np.testing.assert_array_equal(both.codes, one.codes)
    np.testing.assert_array_equal(both.confidence, one.confidence)
    assert np.abs(one.probability - two.probability[:, ::-1]).max() > 1e-3


def test_threshold(image: np.ndarray) -> None:
    bundle = feature_bundle()
    masks = {}
    for threshold in (0.45, 0.5, 0.55):
        options = DecodingOptions(dtype="float32", method="refine", threshold=threshold)
        prediction = Segmenter(bundle, options).segment(image, TEXTS[0])
        np.testing.assert_array_equal(prediction.mask, prediction.probability >= np.float32(threshold))
        masks[threshold] = prediction.mask
    assert masks[0.45].sum() > masks[0.5].sum() > masks[0.55].sum()
    wide = Segmenter(bundle, DecodingOptions(dtype="float32", method="refine", threshold=0.45))
    tall = np.repeat(image, 2, 0)
    prediction = wide.segment(tall, TEXTS[0])
    np.testing.assert_array_equal(prediction.mask, resize_mask(prediction.probability, 64, SIDE, threshold=0.45))


def test_a_chosen_decoding_is_saved_and_changed(tmp_path: Any, image: np.ndarray) -> None:
    bundle = feature_bundle()
    bundle.decoding = {"method": "refine", "passes": 2, "threshold": 0.4}
    bundle.save_pretrained(tmp_path)
    loaded = Segmenter.from_pretrained(tmp_path, dtype="float32")
    assert (loaded.options.method, loaded.options.passes, loaded.options.threshold) == ("refine", 2, 0.4)
    expected = Segmenter(bundle, DecodingOptions(method="refine", passes=2, threshold=0.4, dtype="float32"))
    np.testing.assert_array_equal(loaded.segment(image, "a").mask, expected.segment(image, "a").mask)
    assert DecodingOptions.of_bundle(bundle, passes=1).threshold == 0.4
    other = DecodingOptions.of_bundle(bundle, method="greedy", threshold=None)
    assert (other.method, other.passes, other.threshold) == ("greedy", 1, 0.5)
    greedy = feature_bundle()
    assert DecodingOptions.of_bundle(greedy, passes=None, seed=None).method == "greedy"
    for model, name, value in (
        *((greedy, *given) for given in (("passes", 3), ("samples", 2), ("temperature", 2.0), ("top_p", 0.5))),
        *((greedy, "seed", 0), (bundle, "seed", 0)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be given with method '\w+', which alone reads it, got"):
            DecodingOptions.of_bundle(model, **{name: value})
    # What was saved with the model was not given.
    bundle.decoding = bundle.decoding | {"top_p": 0.5}
    assert DecodingOptions.of_bundle(bundle, passes=1).top_p == 0.5
    assert DecodingOptions.of_bundle(bundle, method="sample", seed=3).seed == 3
    with pytest.raises(ValueError, match=r"top_p must be given with method 'sample', .* got 0.5 with 'greedy'"):
        Segmenter.from_pretrained(tmp_path / "nothing here", method="greedy", top_p=0.5)
    with pytest.raises(ValueError, match=r"options must be None with changes .* got both: \['passes'\]"):
        Segmenter.from_pretrained(tmp_path, DecodingOptions(), passes=1)
    with pytest.raises(ValueError, match="passes must be an integer >= 0, got -3"):
        Segmenter.from_pretrained(tmp_path / "nothing here", passes=-3)


def test_images_are_taken_by_index(image: np.ndarray) -> None:
    segmenter = Segmenter(feature_bundle("both"), DecodingOptions(mirror=True))
    pictures = [image, image[::-1].copy(), image.T.copy()]
    encoded = segmenter.encode(pictures)
    assert len(encoded) == 3
    taken, own = encoded.take([2, 0]), segmenter.encode([pictures[2], pictures[0]])
    vision = segmenter.bundle.vision
    prepared = segmenter.encode_prepared(
        np.stack([prepare(pictures[i], None, vision.image_size, vision.channels)[0] for i in (2, 0)])
    )
    for a, b in ((taken, own), (taken.mirrored, own.mirrored), (prepared, own), (prepared.mirrored, own.mirrored)):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.pixels, b.pixels)
    assert torch.is_grad_enabled()
