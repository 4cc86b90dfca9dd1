"""A volume and sentences in, a mask of the volume for each sentence out, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from ntpseg.data import resize_probability
from ntpseg.data.tables import is_sentence
from ntpseg.generation.options import Prediction
from ntpseg.generation.post_processing import PostProcessing
from ntpseg.models.volume_input import VolumeInput
from ntpseg.utils.checks import check_choice
from ntpseg.volumes import AXES, Axis, Geometry, Volume
from ntpseg.volumes.volume import display
from ntpseg.volumes.windows import Rendered, parse_window, render

if TYPE_CHECKING:
    from ntpseg.generation.segmenter import Segmenter


@dataclass(frozen=True, slots=True, eq=False)
class VolumePrediction:
    """What one sentence refers to in a volume.

    Attributes:
        text: the sentence.
        mask: bool ``[D, H, W]``, on the grid of `Volume.voxels`.
        confidence: float32 ``[count]``, of each slice along `axis` the mean over its patches of the probability of the
            chosen mask code. It says how sure the model is of the mask that it drew, not that the structure is there.
        probability: float16 ``[D, H, W]``, the foreground probability of each voxel before post-processing; None
            unless asked for.
        axis: along which the volume was cut.
        window: what was really used, such as "-160..240" for "auto".
        geometry: grid of `mask`.
        stored: grid of the volume's file.
        spacing_known: whether the file states its millimetres.
    """

    text: str
    mask: np.ndarray
    confidence: np.ndarray
    probability: np.ndarray | None
    axis: Axis
    window: str
    geometry: Geometry
    stored: Geometry
    spacing_known: bool = True

    def to_stored(self, voxels: np.ndarray | None = None) -> np.ndarray:
        """`mask`, or another array over it such as `probability`, on the grid of the volume's file."""
        return np.ascontiguousarray(self.stored.from_lps(self.mask if voxels is None else voxels))

    @property
    def ml(self) -> float | None:
        """Millilitres of the mask; None where the file states no millimetres."""
        return float(self.mask.sum()) * voxel_ml(self.geometry) if self.spacing_known else None


@dataclass(frozen=True, slots=True, eq=False)
class SlicePrediction:
    """One slice as soon as it is decoded.

    Attributes:
        index: as in `Volume.slice`.
        predictions: of each sentence, in the orientation of `Volume.slice`.
    """

    index: int
    predictions: tuple[Prediction, ...]


def voxel_ml(geometry: Geometry) -> float:
    """Millilitres of one voxel; the axes of a grid need not be perpendicular."""
    return float(abs(np.linalg.det(geometry.affine[:3, :3]))) / 1000


def chosen_input(known: VolumeInput, axis: Axis | None, window: str | None) -> tuple[Axis, str]:
    """The axis and the window to segment with: those given, else those that the model remembers.

    Raises:
        ValueError: one is neither given nor remembered.
    """
    chosen_axis, chosen_window = axis or known.axis, window or known.window
    if chosen_axis is None:
        raise ValueError(
            "axis must be given for a model that remembers none of its training, got none; choose one of "
            f"{', '.join(AXES)} (--axis axial)"
        )
    check_choice("axis", chosen_axis, AXES)
    if chosen_window is None:
        raise ValueError(
            "window must be given for a model that remembers none of its training, got none; give a name, a range "
            "or auto (--window soft-tissue, --window -160..240, --window lung+soft-tissue+bone)"
        )
    return chosen_axis, chosen_window


def segment_slices(
    segmenter: Segmenter,
    volume: Volume,
    texts: Sequence[str],
    *,
    axis: Axis | None = None,
    window: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[SlicePrediction]:
    """Segment a volume's slices in order, each yielded with the masks of all sentences once its group is decoded.

    Slices are rendered and encoded in groups of ``batch_size // len(texts)``, once for all sentences: what is held
    beside the volume does not grow with its number of slices, and with the number of sentences only by their masks of
    one slice.

    Args:
        segmenter: the model and how it decodes.
        volume: as `read_volume` gives it.
        texts: the sentences, at least one.
        axis, window: those that the model remembers by default, see `chosen_input`.
        progress: called with the number of masks of slices just finished; ``count(axis) * len(texts)`` in all.

    Raises:
        ValueError: no sentence, one that says nothing, no axis or window, or a window that does not suit the volume.
    """
    cut, spec = chosen_input(segmenter.bundle.volume, axis, window)
    return _stream(segmenter, render(volume, parse_window(spec)), volume.count(cut), _checked(texts), cut, progress)


def _checked(texts: Sequence[str]) -> list[str]:
    texts = list(texts)
    if not texts or not all(isinstance(text, str) and is_sentence(text) for text in texts):
        raise ValueError(f"text must be a sentence that says what to segment, or several, got {texts}")
    return texts


def _stream(
    segmenter: Segmenter,
    rendered: Rendered,
    count: int,
    texts: Sequence[str],
    axis: Axis,
    progress: Callable[[int], None] | None,
) -> Iterator[SlicePrediction]:
    together = max(1, segmenter.options.batch_size // len(texts))
    for first in range(0, count, together):
        indices = range(first, min(first + together, count))
        slices = [rendered.slice(index, axis) for index in indices]
        yield from _decode(segmenter, slices, indices, texts, progress)


def _decode(
    segmenter: Segmenter,
    slices: Sequence[np.ndarray],
    indices: Sequence[int],
    texts: Sequence[str],
    progress: Callable[[int], None] | None,
) -> Iterator[SlicePrediction]:
    encoded = segmenter.encode(slices)
    height, width = slices[0].shape[:2]
    found: list[list[Prediction]] = [[] for _ in slices]
    for start in range(0, len(texts), segmenter.options.batch_size):
        part = texts[start : start + segmenter.options.batch_size]
        places = [place for place in range(len(slices)) for _ in part]
        generated = segmenter.decode(encoded.take(places), [*part] * len(slices), progress)
        for i, probability in enumerate(segmenter.probabilities(generated)):
            mask = resize_probability(probability, height, width) >= segmenter.options.threshold
            found[places[i]].append(segmenter.prediction(generated, i, probability, mask))
    for index, predictions in zip(indices, found):
        yield SlicePrediction(index, tuple(predictions))


def segment_volume(
    segmenter: Segmenter,
    volume: Volume | str | PathLike[str],
    texts: Sequence[str],
    *,
    axis: Axis | None = None,
    window: str | None = None,
    series: str | None = None,
    post_processing: PostProcessing | None = None,
    probability: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[VolumePrediction]:
    """What each sentence refers to in a volume; see `Segmenter.segment_volume`."""
    from ntpseg.volumes.reading import read_volume

    texts = _checked(texts)
    cut, spec = chosen_input(segmenter.bundle.volume, axis, window)
    post_processing = post_processing or PostProcessing()
    if not isinstance(volume, Volume):
        volume = read_volume(volume, series=series)
    post_processing.check(volume.header.spacing_known)
    rendered = render(volume, parse_window(spec))
    shape = volume.geometry.shape
    masks = [np.zeros(shape, bool) for _ in texts]
    maps = [np.zeros(shape, np.float16) if probability else None for _ in texts]
    confidence = np.zeros((len(texts), volume.count(cut)), np.float32)
    for found in _stream(segmenter, rendered, volume.count(cut), texts, cut, progress):
        for n, prediction in enumerate(found.predictions):
            display(masks[n], found.index, cut)[...] = prediction.mask
            confidence[n, found.index] = prediction.confidence.mean()
            if (whole := maps[n]) is not None:
                height, width = prediction.mask.shape
                display(whole, found.index, cut)[...] = resize_probability(prediction.probability, height, width)
    for mask in masks:
        post_processing.apply(mask, voxel_ml(volume.geometry))
    grids = (volume.geometry, volume.stored, volume.header.spacing_known)
    used = rendered.window or spec
    return [VolumePrediction(text, masks[n], confidence[n], maps[n], cut, used, *grids) for n, text in enumerate(texts)]
