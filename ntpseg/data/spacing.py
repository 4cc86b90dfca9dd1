"""Millimetres of an image's pixels: from the table, else from the header of a file that has one."""

from __future__ import annotations

import os
from pathlib import Path

from ntpseg.data.records import Record


def pixel_mm(record: Record, size: tuple[int, int]) -> tuple[float, float] | None:
    """Millimetres between rows and between columns of a record's image.

    Args:
        record: its place has precedence over its file.
        size: height and width of the image as it was read.

    Returns:
        None where neither the table nor the file states them (PNG, JPEG and TIFF files never do: what they hold is
        the resolution of a screen or a scanner).
    """
    if record.place is not None and record.place.pixel_mm is not None:
        return record.place.pixel_mm
    return file_pixel_mm(record.image, size)


def file_pixel_mm(path: Path, size: tuple[int, int]) -> tuple[float, float] | None:
    """The same of a DICOM, NIfTI, NRRD or MetaImage file of one slice; None for any other, and where it states none."""
    from ntpseg.volumes.contents import kind_of

    if kind_of(path) is None:
        return None
    from ntpseg.volumes import AXES
    from ntpseg.volumes.reading import read_volume

    volume = read_volume(os.fspath(path))
    axis = next((axis for axis in AXES if volume.count(axis) == 1), None)
    if axis is None or not volume.header.spacing_known or volume.slice(0, axis).shape[:2] != size:
        return None
    return volume.pixel_spacing(axis)
