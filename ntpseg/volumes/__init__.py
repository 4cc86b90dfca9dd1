"""Volumes: DICOM, NIfTI and other files of hospitals and public sets, read, sliced and written."""

from __future__ import annotations

from ntpseg.volumes.geometry import AXES, Axis, Geometry
from ntpseg.volumes.volume import Header, Volume

__all__ = ["AXES", "Axis", "Geometry", "Header", "Volume"]
