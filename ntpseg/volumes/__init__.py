"""Volumes: DICOM, NIfTI and other files of hospitals and public sets, read, sliced and written."""

from __future__ import annotations

from ntpseg.volumes.geometry import AXES, Axis, Geometry
from ntpseg.volumes.reading import SeriesInfo, is_volume, list_series, read_volume
from ntpseg.volumes.volume import Header, Volume
from ntpseg.volumes.windows import Rendered, parse_window, render

__all__ = [
    "AXES",
    "Axis",
    "Geometry",
    "Header",
    "Rendered",
    "SeriesInfo",
    "Volume",
    "is_volume",
    "list_series",
    "parse_window",
    "read_volume",
    "render",
]
