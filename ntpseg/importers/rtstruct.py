"""DICOM structure sets (RTSTRUCT) beside the series that they were drawn on: planar contours, filled slice by slice.

A voxel belongs to a structure where its centre lies inside of an odd number of its contours in one plane, so contours
inside of others are holes. Of several planes in a slice the nearest to its middle counts; slices without a contour stay
empty, as they were left. Files are found as for DICOM-SEG, and patients become numbers in the same way.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.importers.base import Case, Sample, Structure
from ntpseg.importers.dicom_files import STRUCTURE_SET, Series, find_series, referenced_uids, source_of
from ntpseg.importers.dicom_seg import load_series
from ntpseg.importers.loading import LayerPacker
from ntpseg.importers.options import ImportOptions
from ntpseg.volumes import Geometry

# Of the distance between slices: how far a contour may leave its plane.
_FLAT = 0.1
# How far contours of one plane may lie apart.
_SAME_PLANE = 0.25


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the structure sets of a folder.

    Raises:
        ValueError: a package is missing, there is none, or its series is not in the folder.
    """
    from ntpseg.volumes.extras import require

    pydicom = require("pydicom", "medical", "DICOM structure sets")
    if not source.is_dir():
        raise ValueError(f"source must be a folder of DICOM series and structure sets, got the file {source}")
    series = find_series(source)
    cases = []
    numbers: Counter[str] = Counter()
    for path in (path for one in series if one.kind == STRUCTURE_SET for path in one.files):
        images = source_of(str(path), *referenced_uids(pydicom.dcmread(path)), series)
        numbers[images.subject] += 1
        name = f"{images.subject}_{numbers[images.subject]:02d}"
        cases.append(Case(name, images.subject, functools.partial(_load, images, path)))
    if not cases:
        raise ValueError(
            f"source must hold DICOM structure sets (RTSTRUCT), got {len(series)} other series in {source}"
        )
    return cases


def _load(images: Series, path: Path) -> Sample:
    import pydicom

    dataset = pydicom.dcmread(path)
    volume = load_series(images, referenced_uids(dataset)[1])
    packer = LayerPacker(volume.voxels.shape[:3])
    try:
        names = {int(roi.ROINumber): str(roi.ROIName) for roi in dataset.StructureSetROISequence}
        contours = {int(roi.ReferencedROINumber): _contours(roi) for roi in dataset.get("ROIContourSequence", [])}
    except (AttributeError, TypeError, ValueError) as error:
        # The library's message may hold values of the header.
        raise ValueError(
            f"{path} must be a readable DICOM structure set, got a damaged one ({type(error).__name__})"
        ) from error
    parts: dict[str, tuple[tuple[int, int], ...]] = {}
    for number, name in names.items():
        # A name without a contour is of a structure that was planned and not drawn: nobody looked for it.
        if contours.get(number):
            mask = fill_contours(f"{name!r} of {path}", contours[number], volume.geometry)
            parts[name] = (*parts.get(name, ()), *([packer.add(mask)] if mask.any() else []))
    return Sample((volume,), tuple(packer.layers), tuple(Structure(*item) for item in parts.items()))


def _contours(roi: Any) -> list[np.ndarray]:
    """Millimetres [N, 3], LPS, of the closed contours of a structure; points and open lines enclose nothing."""
    return [
        np.asarray(contour.ContourData, dtype=np.float64).reshape(-1, 3)
        for contour in roi.get("ContourSequence", [])
        if contour.ContourGeometricType in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "INTERPOLATED_PLANAR")
    ]


def fill_contours(name: str, contours: list[np.ndarray], geometry: Geometry) -> np.ndarray:
    """Voxels whose centres lie inside of an odd number of contours of the plane that is nearest to their slice.

    Args:
        name: for errors.
        contours: millimetres [N, 3] each, LPS.
        geometry: grid of the volume, turned to LPS.

    Returns:
        bool [D, H, W].

    Raises:
        ValueError: a contour does not lie in an axial slice.
    """
    from matplotlib.path import Path as Outline

    mask = np.zeros(geometry.shape, bool)
    to_voxels = np.linalg.inv(geometry.affine)
    places = [contour @ to_voxels[:3, :3].T + to_voxels[:3, 3] for contour in contours]
    if any(np.ptp(place[:, 2]) > _FLAT for place in places):
        raise ValueError(f"contours of {name} must lie in the slices of their series, got one across them")
    heights = np.array([place[:, 2].mean() for place in places])
    # Halves go up, all of them.
    slices = np.floor(heights + 0.5).astype(int)
    nearest = {index: min(heights[slices == index], key=lambda height: abs(height - index)) for index in set(slices)}
    for contour, place, height, index in zip(contours, places, heights, slices):
        if abs(height - nearest[index]) > _SAME_PLANE:
            continue
        low = np.maximum(np.floor(place[:, :2].min(axis=0)), 0).astype(int)
        high = np.minimum(np.ceil(place[:, :2].max(axis=0)), np.array(geometry.shape)[[2, 1]] - 1).astype(int)
        if not 0 <= index < geometry.shape[0] or len(contour) < 3 or (low > high).any():
            continue
        columns, rows = np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1))
        inside = Outline(place[:, :2]).contains_points(np.stack([columns.ravel(), rows.ravel()], axis=-1))
        mask[index, low[1] : high[1] + 1, low[0] : high[0] + 1] ^= inside.reshape(rows.shape)
    return mask
