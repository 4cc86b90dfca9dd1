"""`Segmenter.segment_volume`: the same masks as slice by slice, in a memory that slices do not add to."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_segmenter import TEXTS, shared

from ntpseg.generation import DecodingOptions, PostProcessing, Segmenter, segment_slices
from ntpseg.models.volume_input import VolumeInput
from ntpseg.volumes import AXES, Axis, Geometry, Header, Volume

# The pictures' own grey levels.
WINDOW = "0..255"


def stack(count: int = 7) -> np.ndarray:
    """Slices as in the training data, int16 ``[count, 48, 48]``."""
    records = [r for r in shared()[0] if np.asarray(Image.open(r.image)).shape == (48, 48)]
    chosen = [records[n % len(records)].image for n in range(count)]
    return np.stack([np.asarray(Image.open(path)) for path in chosen]).astype(np.int16)


def volume_of(voxels: np.ndarray, spacing: tuple[float, float, float] = (0.5, 0.5, 2.0), **header: Any) -> Volume:
    return Volume.from_stored(voxels, np.diag([*spacing, 1.0]), Header(**header))


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(shared()[1], DecodingOptions(batch_size=4, dtype="float32"))


@pytest.mark.parametrize("axis", AXES)
def test_a_volume_is_its_slices_one_by_one(segmenter: Segmenter, axis: Axis) -> None:
    volume = volume_of(stack())
    done: list[int] = []
    found = segmenter.segment_volume(volume, TEXTS[0], axis=axis, window=WINDOW, probability=True, progress=done.append)
    assert found.mask.shape == volume.voxels.shape and found.mask.dtype == bool and found.mask.any()
    assert sum(done) == volume.count(axis) == len(found.confidence)
    assert found.probability is not None and found.probability.dtype == np.float16
    cut = dataclasses.replace(volume, voxels=found.mask)
    maps = dataclasses.replace(volume, voxels=found.probability)
    for index in range(0, volume.count(axis), 5):
        one = segmenter.segment(volume.slice(index, axis).astype(np.uint8), TEXTS[0])
        np.testing.assert_array_equal(cut.slice(index, axis), one.mask)
        np.testing.assert_allclose(found.confidence[index], one.confidence.mean(), rtol=1e-4)
        likely = maps.slice(index, axis)
        far = np.abs(likely - segmenter.options.threshold) > 1e-3
        np.testing.assert_array_equal((likely >= segmenter.options.threshold)[far], one.mask[far])


def test_several_sentences_are_those_one_by_one_and_share_the_encoded_slices(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, encoded = volume_of(stack()), []
    original = segmenter.bundle.vision.encode_image

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return original(pixels)

    monkeypatch.setattr(segmenter.bundle.vision, "encode_image", counted)
    together = segmenter.segment_volume(volume, TEXTS[:2], axis="axial", window=WINDOW)
    assert sum(encoded) == 7 and max(encoded) == 2
    for text, found in zip(TEXTS[:2], together, strict=True):
        alone = segmenter.segment_volume(volume, text, axis="axial", window=WINDOW)
        assert found.text == text
        np.testing.assert_array_equal(found.mask, alone.mask)
        np.testing.assert_allclose(found.confidence, alone.confidence, rtol=1e-4)
    assert (together[0].mask != together[1].mask).any()


def test_more_sentences_than_a_batch_are_decoded_in_batches(segmenter: Segmenter) -> None:
    texts = [f"The left square, {n}." for n in range(6)]
    found = segmenter.segment_volume(volume_of(stack(2)), texts, axis="axial", window=WINDOW)
    assert [prediction.text for prediction in found] == texts
    last = segmenter.segment_volume(volume_of(stack(2)), texts[-1], axis="axial", window=WINDOW)
    np.testing.assert_array_equal(found[-1].mask, last.mask)


def test_the_memory_of_a_stream_does_not_grow_with_its_slices(segmenter: Segmenter) -> None:
    def peak(count: int) -> int:
        volume = volume_of(np.broadcast_to(stack(1), (count, 48, 48)))
        tracemalloc.start()
        slices = sum(1 for _ in segment_slices(segmenter, volume, TEXTS[:2], axis="axial", window=WINDOW))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert slices == count
        return used

    peak(4)  # what is imported and compiled on first use
    short, long = peak(8), peak(80)
    # What the codes, pixels, probabilities and masks of 72 more slices would take together.
    held = 72 * 2 * (48 * 48 + 32 * 32 * 4)
    assert long - short < held / 10, (short, long)


def test_a_slice_is_yielded_before_the_next_group_is_rendered(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = segmenter.encode

    def counted(images: Any) -> Any:
        images = list(images)
        seen.append(len(images))
        return original(images)

    monkeypatch.setattr(segmenter, "encode", counted)
    stream: Iterator[Any] = segment_slices(segmenter, volume_of(stack()), TEXTS[:1], axis="axial", window=WINDOW)
    assert seen == []
    assert next(stream).index == 0 and seen == [4]
    assert [found.index for found in stream] == [1, 2, 3, 4, 5, 6] and seen == [4, 3]


def test_a_volume_turned_in_its_file_gives_the_same_and_goes_back(segmenter: Segmenter) -> None:
    voxels = stack()
    plain = segmenter.segment_volume(volume_of(voxels), TEXTS[0], axis="axial", window=WINDOW)
    # i to the right, j to the front, k to the feet; then the array's axes in another order.
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, -0.5], [0, -0.5, 0], [-2.0, 0, 0]])
    turned = np.ascontiguousarray(voxels[::-1, ::-1, ::-1].transpose(2, 1, 0))
    found = segmenter.segment_volume(Volume.from_stored(turned, affine), TEXTS[0], axis="axial", window=WINDOW)
    np.testing.assert_array_equal(found.mask, plain.mask)
    stored = found.to_stored()
    assert stored.shape == turned.shape
    np.testing.assert_array_equal(stored.transpose(2, 1, 0)[::-1, ::-1, ::-1], plain.mask)


@pytest.mark.parametrize("axis", AXES)
def test_a_single_slice_is_a_volume_too(segmenter: Segmenter, axis: Axis) -> None:
    shape = [48, 48]
    shape.insert(AXES.index(axis), 1)
    volume = volume_of(stack(1).reshape(shape), (0.5, 3.0, 20.0))
    found = segmenter.segment_volume(volume, TEXTS[0], axis=axis, window=WINDOW)
    one = segmenter.segment(volume.slice(0, axis).astype(np.uint8), TEXTS[0])
    np.testing.assert_array_equal(dataclasses.replace(volume, voxels=found.mask).slice(0, axis), one.mask)


def test_axis_and_window_are_those_that_the_model_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    _, bundle, _ = shared()
    known = Segmenter(
        dataclasses.replace(bundle, volume=VolumeInput("coronal", WINDOW)), DecodingOptions(dtype="float32")
    )
    volume = volume_of(stack(3))
    found = known.segment_volume(volume, TEXTS[0])
    assert (found.axis, found.window) == ("coronal", WINDOW)
    assert known.segment_volume(volume, TEXTS[0], axis="axial").axis == "axial"
    unknown = Segmenter(bundle, DecodingOptions(dtype="float32"))
    with pytest.raises(ValueError, match=r"^axis must be given for a model that remembers none .* \(--axis axial\)$"):
        unknown.segment_volume(volume, TEXTS[0], window=WINDOW)
    with pytest.raises(ValueError, match=r"^window must be given for a model that remembers none"):
        unknown.segment_volume(volume, TEXTS[0], axis="axial")


@pytest.mark.parametrize("texts", ["", [], ["The left square.", " "]])
def test_sentences_that_say_nothing_are_refused(segmenter: Segmenter, texts: Any) -> None:
    with pytest.raises(ValueError, match=r"^text must be a sentence that says what to segment"):
        segmenter.segment_volume(volume_of(stack(1)), texts, axis="axial", window=WINDOW)


def test_a_bundle_remembers_and_older_ones_load(tmp_path: Path) -> None:
    from ntpseg.models import Bundle

    _, bundle, run = shared()
    assert Bundle.from_pretrained(run).volume == VolumeInput()
    assert not (run / "model" / "volume.json").exists()
    known = VolumeInput("sagittal", "lung+soft-tissue+bone")
    dataclasses.replace(bundle, volume=known).save_pretrained(tmp_path / "model")
    assert Bundle.from_pretrained(tmp_path / "model").volume == known
    with pytest.raises(ValueError, match="axis must be one of"):
        VolumeInput("oblique")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window must be the text of a window or None"):
        VolumeInput(window=" ")


def parts() -> np.ndarray:
    mask = np.zeros((4, 10, 10), bool)
    mask[1:3, 1:5, 1:5] = True  # 32 voxels
    mask[0, 8, 8] = True
    mask[3, 5, 5] = True  # touches the block at a corner only
    mask[1:4, 7, 1:4] = True  # 9 voxels
    return mask


@pytest.mark.parametrize(
    ("options", "voxels"),
    [
        (PostProcessing(), 43),
        (PostProcessing(largest_component=True), 32),
        (PostProcessing(min_ml=0.01), 41),
        (PostProcessing(min_ml=0.0091), 41),
        (PostProcessing(min_ml=0.0101), 32),
        (PostProcessing(largest_component=True, min_ml=1), 0),
    ],
)
def test_post_processing_keeps_what_it_says(options: PostProcessing, voxels: int) -> None:
    mask = parts()
    options.apply(mask, 0.01 / 9)
    assert mask.sum() == voxels
    assert not (mask & ~parts()).any()
    empty = np.zeros((2, 3, 4), bool)
    options.apply(empty, 1.0)
    assert not empty.any()


def test_post_processing_is_off_by_default_and_counts_millilitres(segmenter: Segmenter) -> None:
    volume = volume_of(stack(2))
    plain = segmenter.segment_volume(volume, TEXTS[0], axis="axial", window=WINDOW)
    assert plain.ml == pytest.approx(plain.mask.sum() * 0.5 * 0.5 * 2 / 1000)
    clean = segmenter.segment_volume(
        volume, TEXTS[0], axis="axial", window=WINDOW, post_processing=PostProcessing(min_ml=1000)
    )
    assert plain.mask.any() and not clean.mask.any()
    blind = volume_of(stack(2), spacing_known=False)
    assert segmenter.segment_volume(blind, TEXTS[0], axis="axial", window=WINDOW).ml is None
    with pytest.raises(ValueError, match="min_ml must be 0 where the file states no millimetres, got 2; leave"):
        segmenter.segment_volume(blind, TEXTS[0], axis="axial", window=WINDOW, post_processing=PostProcessing(min_ml=2))
    with pytest.raises(ValueError, match="min_ml must be a number >= 0"):
        PostProcessing(min_ml=-1)


def test_a_sheared_grid_has_the_volume_of_its_voxels() -> None:
    from ntpseg.generation.volume import voxel_ml

    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[1, 2] = 2.0  # a tilted gantry: the slices are 2 mm apart along the normal
    assert voxel_ml(Geometry((2, 2, 2), affine)) == pytest.approx(0.002)
