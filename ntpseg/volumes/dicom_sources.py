"""The headers of the DICOM files that a volume was read from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ntpseg.volumes.extras import require

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def source_headers(path: Path, series: str | None) -> list[Dataset]:
    """The headers, without pixels, of the series that `read_volume` reads: of its slices, or of its one file.

    They hold what tells whose images these are: for writing a DICOM-SEG object, and for nothing else.
    """
    pydicom = require("pydicom", "medical", "reading DICOM")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
