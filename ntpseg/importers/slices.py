"""A sample as flat pictures: slices of a volume as they are displayed, or the one 2-D image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ntpseg.importers.base import Sample
from ntpseg.importers.options import ImportOptions
from ntpseg.volumes import AXES, Axis, Volume
from ntpseg.volumes.volume import display

if TYPE_CHECKING:
    from ntpseg.volumes.windows import Rendered


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """The pictures of a sample, made one by one.

    Attributes:
        count: number of pictures.
        axis: along which they follow each other; None: one 2-D image.
        pixel_spacing: millimetres between rows and columns; None where unknown.
        slice_mm: millimetres between slices; None where unknown, and for a 2-D image.
        window: text of what was really used; "" where pixels are as stored.
        modality: "CT", ...; "" where unknown.
        pixels: of picture `index`: uint8 [H, W] or [H, W, 3].
        labels: of picture `index` and layer `layer`: integers [H, W].
    """

    count: int
    axis: Axis | None
    pixel_spacing: tuple[float, float] | None
    slice_mm: float | None
    window: str
    modality: str
    pixels: Callable[[int], np.ndarray]
    labels: Callable[[int, int], np.ndarray]


def slices_of(name: str, sample: Sample, options: ImportOptions) -> Slices:
    """The pictures of a sample along the axis of `options`; a volume of one slice is a 2-D image.

    Raises:
        ValueError: image and labels have different sizes, or the window does not fit; the message names the case.
    """
    if isinstance(sample.image, tuple):
        return _of_volumes(name, sample, sample.image, options)
    from ntpseg.data.images import read_windowed

    if isinstance(sample.image, np.ndarray):
        pixels, window = sample.image, None
    else:
        pixels, window = read_windowed(sample.image)
    for layer in sample.labels:
        _check_size(name, layer.shape, pixels.shape[:2])
    return Slices(
        1,
        None,
        sample.spacing,
        None,
        str(window or ""),
        sample.modality,
        lambda _: pixels,
        lambda _, layer: sample.labels[layer],
    )


def _of_volumes(name: str, sample: Sample, volumes: tuple[Volume, ...], options: ImportOptions) -> Slices:
    from ntpseg.volumes.windows import parse_window, render

    first = volumes[0]
    grid = first.voxels.shape[:3]
    for volume in volumes[1:]:
        _check_size(name, volume.voxels.shape[:3], grid, "channels must have one grid")
    for layer in sample.labels:
        _check_size(name, layer.shape, grid)
    if sample.modality:
        volumes = tuple(replace(volume, header=replace(volume.header, modality=sample.modality)) for volume in volumes)
    spec = parse_window(options.window)
    rendered = [render(volume, spec) for volume in volumes]
    if len(volumes) > 1 and any(len(one.limits) > 1 for one in rendered):
        raise ValueError(f"window must be one for each of several channels, got {options.window!r}")
    # An X-ray, or a 2-D NIfTI file: one slice, whichever way it stands.
    flat = [axis for axis, voxels in zip(AXES, grid) if voxels == 1]
    axis: Axis = flat[0] if flat else options.axis  # type: ignore[assignment]
    known = first.header.spacing_known
    slice_mm = first.geometry.spacing[AXES.index(axis)] if known and not flat else None

    def pixels(index: int) -> np.ndarray:
        channels = [one.slice(index, axis) for one in rendered]
        if len(channels) == 1:
            return channels[0]
        # Of two channels the third is black.
        channels += [np.zeros_like(channels[0])] * (3 - len(channels))
        return np.stack(channels, axis=-1)

    return Slices(
        first.count(axis),
        None if flat else axis,
        first.pixel_spacing(axis) if known else None,
        slice_mm,
        window_text(rendered),
        first.header.modality or sample.modality,
        pixels,
        lambda index, layer: display(sample.labels[layer], index, axis),
    )


def window_text(rendered: Sequence[Rendered]) -> str:
    """The window that was really used, as text; of several channels, joined by "+" where they differ."""
    texts = list(dict.fromkeys(one.window for one in rendered))
    return "+".join(texts)


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """A picture whose longer side is at most `size` pixels; averaged."""
    shape = target_shape(pixels.shape[:2], size)
    if shape == pixels.shape[:2]:
        return pixels
    picture = Image.fromarray(np.ascontiguousarray(pixels)).resize(shape[::-1], Image.Resampling.BOX)
    return np.asarray(picture)


def resized_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask for a picture of `resized`: foreground is what at least half of which was; uint8 [h, w] of 0 and 255."""
    shape = target_shape(mask.shape, size)
    if shape == mask.shape:
        return mask.astype(np.uint8) * 255
    share = Image.fromarray(mask.astype(np.float32)).resize(shape[::-1], Image.Resampling.BOX)
    return (np.asarray(share) >= 0.5).astype(np.uint8) * 255


def target_shape(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Rows and columns of a picture whose longer side is at most `size`; 0: any."""
    longest = max(shape)
    if not size or longest <= size:
        return shape[0], shape[1]
    return max(1, round(shape[0] * size / longest)), max(1, round(shape[1] * size / longest))


def _check_size(
    name: str, size: tuple[int, ...], wanted: tuple[int, ...], what: str = "labels must have their image's size"
) -> None:
    if tuple(size) != tuple(wanted):
        got, expected = ("x".join(map(str, reversed(shape))) for shape in (size, wanted))
        raise ValueError(f"{name}: {what}, got {got} for {expected}")
