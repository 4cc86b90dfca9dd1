"""DICOM: a file, a multi-frame file, or a folder of slices as one volume."""

from __future__ import annotations

from pathlib import Path

from ntpseg.volumes.dicom_pixels import read_pixels
from ntpseg.volumes.dicom_series import SeriesInfo, choose_series, list_series
from ntpseg.volumes.dicom_stack import stack
from ntpseg.volumes.volume import Header, Volume

__all__ = ["SeriesInfo", "choose_series", "list_series", "read_dicom"]


def read_dicom(path: Path, series: str | None = None) -> Volume:
    """Read one series of a folder, one multi-frame file, or one slice.

    Args:
        path: a folder, or a file.
        series: which one of several, see `choose_series`.

    Raises:
        ValueError: there is no image or more than one series; slices are missing, unevenly spaced or lie at one place;
            pixels cannot be decoded. The message names the file or folder.
    """
    info = choose_series(path, series)
    planes, affine, known, notes = stack(path, info.planes)
    middle = planes[len(planes) // 2]
    header = Header(
        source="dicom",
        modality=middle.modality,
        body_part=middle.body_part,
        windows=middle.windows,
        spacing_known=known,
        burnt_in=middle.burnt_in,
        inverted=middle.inverted and not middle.colour,
        notes=tuple(dict.fromkeys((*info.notes, *middle.notes, *notes))),
    )
    return Volume.from_stored(read_pixels(planes), affine, header)
