"""The whole headers of the DICOM files that a volume was read from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ntpseg.volumes.dicom import choose_series
from ntpseg.volumes.extras import require

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def source_headers(path: Path, series: str | None = None) -> list[Dataset]:
    """The headers, without pixels, of what `read_volume` reads: of the slices of a series, or of its one file.

    They hold whose images these are: they are for writing a DICOM-SEG object, and for nothing else.

    Args:
        path: a DICOM file, or a folder.
        series: as of `read_volume`.

    Raises:
        ValueError: as of `read_volume`.
    """
    pydicom = require("pydicom", "medical", "reading DICOM")
    files = [file.path for file in choose_series(path, series).files] if path.is_dir() else [path]
    return [pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in files]
