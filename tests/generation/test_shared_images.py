"""Several sentences on one image: the same masks as one by one, and the image is read once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_readout_and_mirror import feature_bundle
from tiny_decoders import feature_format, make_feature_model, make_images, make_prompts
from tiny_segmenter import SIDE, TEXTS, shared

from ntpseg.generation import DecodingOptions, Segmenter, generate_masks


@pytest.mark.parametrize("which", ["codes", "features", "both"])
def test_sentences_together_equal_one_by_one(which: str) -> None:
    bundle = shared()[1] if which == "codes" else feature_bundle(which)
    segmenter = Segmenter(bundle, DecodingOptions(dtype="float32", method="jacobi"))
    image = np.random.default_rng(0).integers(0, 256, (SIDE + 9, SIDE)).astype(np.uint8)
    together = segmenter.segment(image, TEXTS[:3])
    assert isinstance(together, list) and len(together) == 3
    for text, prediction in zip(TEXTS, together):
        alone = segmenter.segment(image, text)
        np.testing.assert_array_equal(prediction.codes, alone.codes)
        np.testing.assert_array_equal(prediction.mask, alone.mask)
        np.testing.assert_allclose(prediction.probability, alone.probability, atol=1e-5)
    assert together[0].mask.shape == (SIDE + 9, SIDE)
    assert (together[0].probability != together[1].probability).any()


def test_an_image_is_encoded_once_for_all_its_sentences(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from ntpseg.data.images import write_png

    segmenter = Segmenter(feature_bundle(), DecodingOptions(dtype="float32"))
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (SIDE, SIDE)).astype(np.uint8) for _ in range(2)]
    counts: list[int] = []
    first = segmenter.bundle.model.front_end.stem.encoder.levels[0][0].conv1
    first.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for path, picture in zip(paths, pictures):
        write_png(path, picture)
    images = [paths[0], paths[1], paths[0], paths[0], paths[1]]
    texts = [TEXTS[i % len(TEXTS)] for i in range(5)]
    found = list(segmenter.segment_all(images, texts))
    assert counts == [2]
    for image, text, prediction in zip(images, texts, found):
        np.testing.assert_array_equal(segmenter.segment(image, text).mask, prediction.mask)


def test_images_that_are_made_on_access_are_different_ones() -> None:
    """Each row of a stack is a new array, which may lie where the last one was."""
    segmenter = Segmenter(feature_bundle(), DecodingOptions(method="expected", dtype="float32"))
    stack = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE)).astype(np.uint8)
    found = list(segmenter.segment_all(stack, [TEXTS[0]] * 6))  # type: ignore[arg-type]
    expected = list(segmenter.segment_all(list(stack), [TEXTS[0]] * 6))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.probability, other.probability)
    assert len({prediction.probability.tobytes() for prediction in found}) == 6


@pytest.mark.parametrize("encoder", ["residual", "huggingface"])
def test_shared_features_equal_repeated_images(encoder: str) -> None:
    sequence = feature_format()
    stem: dict[str, Any] = {"widths": [8, 16], "group_size": 4, "caption_dim": 8, "caption_hidden": 8}
    if encoder == "huggingface":
        config = {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
        }
        stem |= {"encoder": "huggingface", "encoder_config": config}
    model = make_feature_model(sequence, stem=stem)
    images = torch.from_numpy(make_images(3))
    ids = torch.randint(0, sequence.vocabulary.text_size, (5, 4), generator=torch.Generator().manual_seed(0))
    image_of = torch.tensor([2, 0, 0, 2, 1])
    with torch.no_grad():
        expected = model.encode_image(images[image_of], ids)
        found = model.encode_image(images, ids, image_of)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_equal_images_of_unordered_prompts() -> None:
    """Prompts are decoded by length, so that the rows of one image do not lie together."""
    sequence = feature_format()
    model, prompts, images = make_feature_model(sequence), make_prompts(sequence, 6), make_images(6)
    images[[0, 3, 4]] = images[1]
    options = DecodingOptions(dtype="float32", readout="expected")
    found = generate_masks(model, prompts, sequence=sequence, options=options, pixel_values=images)
    for row in range(6):
        one = generate_masks(
            model, prompts[row : row + 1], sequence=sequence, options=options, pixel_values=images[row : row + 1]
        )
        np.testing.assert_allclose(found.probability[row], one.probability[0], atol=1e-5)


def test_no_sentence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^text must be a sentence or several, got none$"):
        Segmenter(feature_bundle(), DecodingOptions()).segment(np.zeros((SIDE, SIDE), np.uint8), [])
