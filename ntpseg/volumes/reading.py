"""Reading volumes of every format: one function, which looks at the content and not at the name."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from ntpseg.volumes.contents import kind_of
from ntpseg.volumes.dicom import SeriesInfo, list_series, read_dicom
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
        series: which series of a folder with several, see `list_series`; which volume of a 4-D NIfTI, from "0".

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
    if series is not None:
        raise ValueError(f"series must be given for a folder of DICOM files or a 4-D NIfTI, got {series!r} for {path}")
    if kind == "dicom":
        return read_dicom(path)
    if kind in ("nrrd", "metaimage"):
        from ntpseg.volumes.itk import read_itk

        return read_itk(path, kind)
    raise ValueError(f"{path} must be DICOM, NIfTI, NRRD or MetaImage, got another file")


def is_volume(path: str | PathLike[str]) -> bool:
    """Whether a path is read by `read_volume` rather than as a picture; opens headers only.

    A file is a volume where its header has three dimensions (one slice counts) or frames, a folder where a DICOM file
    in it says where its slice lies in the patient. A folder of X-rays is not.
    """
    path = Path(path)
    if path.is_dir():
        return any(_is_slice(file) for file in _some_files(path))
    kind = kind_of(path) if path.is_file() else None
    if kind is None:
        return False
    try:
        if kind == "dicom":
            return _frames(path) > 1
        if kind == "nifti":
            from ntpseg.volumes.nifti import open_nifti

            return len(open_nifti(path).shape) > 2
        return _itk_dimensions(path) > 2
    except ValueError:
        # A damaged volume: reading it says what is wrong with it.
        return True


def _some_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        if len(files) >= _LOOKED_AT:
            break
    return files[:_LOOKED_AT]


def _is_slice(path: Path) -> bool:
    if kind_of(path) != "dicom":
        return False
    pydicom = require("pydicom", "medical", "reading DICOM")
    tags = ["Rows", "ImagePositionPatient", "NumberOfFrames"]
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)
    except Exception:  # pydicom raises anything on a damaged header
        return False
    return "Rows" in header and ("ImagePositionPatient" in header or int(header.get("NumberOfFrames") or 1) > 1)


def _frames(path: Path) -> int:
    pydicom = require("pydicom", "medical", "reading DICOM")
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["NumberOfFrames"], force=True)
        return int(header.get("NumberOfFrames") or 1)
    except Exception as error:  # pydicom raises anything on a damaged header
        raise ValueError(str(error)) from error


def _itk_dimensions(path: Path) -> int:
    sitk = require("SimpleITK", "medical", "reading NRRD and MetaImage")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return int(reader.GetDimension())
