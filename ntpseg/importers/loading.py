"""Loading a case from an image file (or one for each channel) and its label map, in 2-D or 3-D, by content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ntpseg.importers.alignment import aligned_labels, describe, grids_agree, integer_labels
from ntpseg.importers.base import Sample, Structure
from ntpseg.volumes import Volume

# Of the names of files: what is before them is the case.
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".dcm", ".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")


def load_pair(
    name: str,
    images: Sequence[Path],
    labels: Path,
    structures: tuple[Structure, ...],
    *,
    ignored: frozenset[int] | None = None,
    modalities: Sequence[str] = ("",),
    series: Sequence[str | None] = (None,),
    resample: bool = False,
    cropped: bool = False,
) -> Sample:
    """The sample of one image, or of one to three channels, and a label map of one layer.

    Args:
        name: of the case, for errors.
        images: one file (or DICOM folder) for grey or colour, or up to three, which become the channels.
        labels: label map of the same dimensions.
        structures, ignored: see `Sample`.
        modalities: of each image; "" as its header says.
        series: of each image, which volume of a 4-D file, from "0".
        resample, cropped: see `ntpseg.importers.alignment.aligned_labels`.

    Raises:
        ValueError: a file cannot be read, or the files do not fit each other; the message names the case.
    """
    if all(is_flat(path) for path in (*images, labels)):
        values = flat_labels(name, labels)
        pixels = flat_image(name, images)
        return Sample(pixels, (values,), structures, modalities[0], ignored=ignored)
    volumes = load_channels(name, images, modalities, series)
    if is_flat(labels):
        # An X-ray in DICOM with a mask that was drawn on its picture.
        values = flat_labels(name, labels)[None]
        if values.shape != volumes[0].stored.shape:
            raise ValueError(
                f"labels of {name} must have the image's shape, {list(volumes[0].stored.shape)}, got "
                f"{list(values.shape)}"
            )
        placed = volumes[0].stored.to_lps(values)[0]
    else:
        placed = load_labels(name, labels, volumes[0], resample, cropped)
    return Sample(volumes, (placed,), structures, modalities[0], ignored=ignored)


def load_channels(
    name: str, images: Sequence[Path], modalities: Sequence[str] = ("",), series: Sequence[str | None] = (None,)
) -> tuple[Volume, ...]:
    """One to three volumes of one grid."""
    from ntpseg.volumes.reading import read_volume

    volumes = []
    missing = len(images)
    for path, modality, part in zip(images, (*modalities, *[""] * missing), (*series, *[None] * missing)):
        volume = read_volume(path, series=part)
        volumes.append(replace(volume, header=replace(volume.header, modality=modality or volume.header.modality)))
        if not grids_agree(volume.geometry, volumes[0].geometry):
            raise ValueError(
                f"channels of {name} must have one grid, got {describe(volume.geometry)} in {path.name} for "
                f"{describe(volumes[0].geometry)} in {images[0].name}; register and resample them first"
            )
    return tuple(volumes)


def load_labels(name: str, path: Path, image: Volume, resample: bool, cropped: bool = False) -> np.ndarray:
    """A label map on the grid of `image`; see `ntpseg.importers.alignment.aligned_labels`."""
    from ntpseg.volumes.reading import read_volume

    return aligned_labels(name, image, read_volume(path), resample=resample, cropped=cropped)


def flat_image(name: str, images: Sequence[Path]) -> Path | np.ndarray:
    """A 2-D image, or one of up to three grey ones as channels."""
    if len(images) == 1:
        return images[0]
    from ntpseg.data.images import read_image

    channels = [read_image(path) for path in images]
    if any(channel.shape != channels[0].shape or channel.ndim != 2 for channel in channels):
        sizes = ", ".join(f"{path.name} {list(channel.shape)}" for path, channel in zip(images, channels))
        raise ValueError(f"channels of {name} must be grey images of one size, got {sizes}")
    return np.stack([*channels, *[np.zeros_like(channels[0])] * (3 - len(channels))], axis=-1)


def flat_labels(name: str, path: Path) -> np.ndarray:
    """A 2-D label map [H, W] as stored; of a palette image its indices."""
    from ntpseg.data.pixels import open_pixels

    pixels = open_pixels(path).pixels
    if pixels.ndim != 2:
        raise ValueError(f"labels of {name} must be numbers, got a colour image {path}; export the label map itself")
    return integer_labels(name, pixels)


def is_flat(path: Path) -> bool:
    """Whether a file is a picture for Pillow; DICOM, NIfTI, NRRD and MetaImage are volumes, perhaps of one slice."""
    from ntpseg.volumes.reading import kind_of

    return path.is_file() and kind_of(path) is None


def case_of_file(path: Path) -> str:
    """The name of a file without the ending of its format."""
    lowered = path.name.lower()
    ending = next((ending for ending in ENDINGS if lowered.endswith(ending)), "")
    return path.name[: -len(ending)] if ending and not path.is_dir() else path.name


class LayerPacker:
    """Packs masks that may overlap into few label maps.

    Args:
        shape: of every mask.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = tuple(shape)
        self.layers: list[np.ndarray] = [np.zeros(self._shape, np.uint8)]
        self._used = [0]

    def add(self, mask: np.ndarray) -> tuple[int, int]:
        """``(layer, value)`` of a bool mask of the shape."""
        for number, layer in enumerate(self.layers):
            if self._used[number] < 255 and not layer[mask].any():
                break
        else:
            self.layers.append(np.zeros(self._shape, np.uint8))
            self._used.append(0)
            number = len(self.layers) - 1
        self._used[number] += 1
        self.layers[number][mask] = self._used[number]
        return number, self._used[number]


def chosen_channels(names: Mapping[int, str], wanted: Sequence[str]) -> list[int]:
    """Numbers of the channels that are used.

    Args:
        names: of every channel by its number.
        wanted: names or numbers; (): the only one.

    Raises:
        ValueError: there are several and none is chosen, or one that is chosen is not there.
    """
    listed = ", ".join(f"{number} ({name})" for number, name in names.items())
    if not wanted:
        if len(names) == 1:
            return list(names)
        raise ValueError(f"--channels must choose from several channels, got none; there are {listed}")
    chosen = []
    for word in wanted:
        match = [number for number, name in names.items() if word in (name, str(number))] or [
            number for number, name in names.items() if word.casefold() == name.casefold()
        ]
        if not match:
            raise ValueError(f"--channels must be among {listed}, got {word!r}")
        chosen.append(match[0])
    return chosen
