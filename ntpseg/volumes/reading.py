"""Reading volumes of every format: one function, which looks at the content and not at the name."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from ntpseg.utils.checks import brief
from ntpseg.volumes.contents import kind_of
from ntpseg.volumes.dicom import read_dicom
from ntpseg.volumes.dicom_headers import read_planes
from ntpseg.volumes.dicom_series import SeriesInfo, list_series
from ntpseg.volumes.extras import require
from ntpseg.volumes.volume import Volume

__all__ = ["SeriesInfo", "is_volume", "kind_of", "list_series", "read_volume"]

# Files of a folder that are looked at before it is taken for one without a volume.
_LOOKED_AT = 200


def read_volume(path: str | PathLike[str], *, series: str | None = None) -> Volume:
    """Read a volume.

    Args:
        path: a NIfTI, NRRD or MetaImage file, a DICOM file of one or many frames, or a folder of DICOM slices (the
            folders inside are searched too).
        series: which series of a folder with several, see `list_series`; which volume of a 4-D file, from "0".

    Returns:
        The volume in one orientation, see `Volume`; a single picture has one slice.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: it holds no volume or several, it is damaged, or a package is not installed; the message names it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} must be a volume, got no file or folder of that name")
    if path.is_dir():
        return read_dicom(path, series)
    kind = kind_of(path)
    if kind == "nifti":
        from ntpseg.volumes.nifti import read_nifti

        return read_nifti(path, series)
    if kind == "dicom":
        return read_dicom(path, series)
    if series is not None:
        raise ValueError(f"series must be given for DICOM or a 4-D NIfTI, got {brief(series)} for {path}")
    if kind in ("nrrd", "metaimage"):
        from ntpseg.volumes.itk import read_itk

        return read_itk(path, kind)
    raise ValueError(f"{path} must be DICOM, NIfTI, NRRD or MetaImage, got another file")


def is_volume(path: str | PathLike[str]) -> bool:
    """Whether a path is read by `read_volume` rather than as a picture; opens headers only.

    A DICOM file is a volume where it has more than one frame, another file where it has three dimensions (one slice
    counts), a folder where a DICOM file in it says where its slice lies in the patient. A folder of X-rays is not.
    """
    path = Path(path)
    if path.is_dir():
        return any(_is_slice(file) for file in _some_files(path))
    shape = _shape(path)
    return shape is not None and (len(shape) > 2 if kind_of(path) != "dicom" else shape[0] > 1)


def has_several_slices(path: str | PathLike[str]) -> bool:
    """Whether a file is no picture, which has one slice; opens headers only."""
    shape = _shape(Path(path))
    return shape is not None and max((*shape, 1, 1)[2:] if kind_of(Path(path)) != "dicom" else shape) > 1


def _shape(path: Path) -> tuple[int, ...] | None:
    """The dimensions of a file, of DICOM the frames alone; None where it is none of the formats.

    A damaged file counts as a volume: reading it says what is wrong with it.
    """
    kind = kind_of(path) if path.is_file() else None
    if kind is None:
        return None
    try:
        if kind == "dicom":
            return (len(read_planes(path)),)
        if kind == "nifti":
            from ntpseg.volumes.nifti import open_nifti

            return tuple(int(size) for size in open_nifti(path).shape)
        return _itk_size(path)
    except ValueError:
        return (2, 2, 2)


def _some_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        if len(files) >= _LOOKED_AT:
            break
    return files[:_LOOKED_AT]


def _is_slice(path: Path) -> bool:
    try:
        planes = read_planes(path)
    except ValueError:
        return False
    return bool(planes) and (planes[0].position is not None or len(planes) > 1)


def _itk_size(path: Path) -> tuple[int, ...]:
    sitk = require("SimpleITK", "medical", "reading NRRD and MetaImage")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return tuple(int(size) for size in reader.GetSize())
