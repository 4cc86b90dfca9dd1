"""The order and the grid of a DICOM series: slices sorted by where they lie in the patient, and what is odd there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ntpseg.volumes.dicom_headers import Plane

# Gaps between slices that differ by less (of the median gap) are rounding in the headers; by more, the slices are no
# grid that one affine describes.
_EVEN, _UNEVEN = 0.01, 0.1
_SAME_PLACE_MM = 1e-3
# Modalities whose slices without a position may still be stacked by their numbers.
_SLICED = ("CT", "MR", "PT")


def stack(path: Path, planes: Sequence[Plane]) -> tuple[list[Plane], np.ndarray, bool, tuple[str, ...]]:
    """Sort slices and find their grid (DICOM PS3.3 C.7.6.2.1.1).

    Args:
        path: file or folder, for messages.
        planes: of one size and direction.

    Returns:
        The slices along their normal; the affine ``[4, 4]`` from voxel (i, j, k, 1) to mm, LPS, sheared where the
        gantry was tilted; whether its millimetres are known; what is odd.

    Raises:
        ValueError: slices lie at one place, are missing, or are unevenly spaced; the message has the values.
    """
    notes: list[str] = []
    first = planes[0]
    if len({plane.spacing for plane in planes}) > 1:
        values = sorted({plane.spacing or (0.0, 0.0) for plane in planes})
        if np.ptp(np.array(values), axis=0).max() > 1e-3:
            low, high = (f"{value[0]:g} x {value[1]:g} mm" for value in (values[0], values[-1]))
            raise ValueError(f"{path} must have one pixel spacing in all its slices, got {low} to {high}")
    placed = all(plane.position is not None for plane in planes) and first.orientation is not None
    if placed:
        planes, step = _sorted(path, planes, notes)
    else:
        planes, step = _by_number(path, planes, notes), None
    rows, columns = first.spacing or (1.0, 1.0)
    if first.spacing is None:
        notes.append("the file does not state its pixels' size: lengths in millimetres are unknown")
    known = first.spacing is not None and (placed or len(planes) == 1)
    orientation = np.array(first.orientation or (1.0, 0, 0, 0, 1, 0))
    normal = np.cross(orientation[:3], orientation[3:])
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * columns
    affine[:3, 1] = orientation[3:] * rows
    affine[:3, 2] = normal * (first.thickness or 1.0) if step is None else step
    if placed:
        affine[:3, 3] = planes[0].position
    return list(planes), affine, known, tuple(notes)


def _sorted(path: Path, planes: Sequence[Plane], notes: list[str]) -> tuple[list[Plane], np.ndarray | None]:
    orientation = np.array(planes[0].orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    positions = np.array([plane.position for plane in planes])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    ordered = [planes[i] for i in order]
    if len(planes) == 1:
        return ordered, None
    along, positions = along[order], positions[order]
    gaps = np.diff(along)
    if (gaps < _SAME_PLACE_MM).any():
        places = int((gaps >= _SAME_PLACE_MM).sum()) + 1
        at = along[int(np.argmin(gaps))]
        raise ValueError(
            f"{path} must have one slice at each place, got {len(planes)} slices at {places} places (two at "
            f"{at:.2f} mm): several phases, echoes or reconstructions in one series; copy one of them to a folder"
        )
    middle = float(np.median(gaps))
    wide = np.flatnonzero(gaps > 1.5 * middle)
    missing = round(float((gaps[wide] / middle).sum())) - len(wide)
    whole = np.abs(gaps[wide] / middle - np.round(gaps[wide] / middle)).max(initial=0) < 0.2
    if len(wide) and whole:
        at = int(wide[0])
        raise ValueError(
            f"{path} must hold every slice of its series, got {len(planes)} of {len(planes) + missing}: {gaps[at]:.4g} "
            f"mm instead of {middle:.4g} mm between {along[at]:.2f} and {along[at + 1]:.2f} mm; copy it again"
        )
    if np.abs(gaps - middle).max() > _UNEVEN * middle:
        raise ValueError(
            f"{path} must have evenly spaced slices, got gaps of {gaps.min():.4g} to {gaps.max():.4g} mm; resample it, "
            "or copy the slices of one spacing to a folder"
        )
    if np.abs(gaps - middle).max() > _EVEN * middle:
        notes.append(f"slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart; they are read as evenly spaced")
    step = (positions[-1] - positions[0]) / (len(planes) - 1)
    straight = positions[0] + np.arange(len(planes))[:, None] * step
    bent = float(np.abs(positions - straight).max())
    if bent > max(0.5 * middle, 1.0):
        raise ValueError(f"{path} must have its slices along one line, got one {bent:.1f} mm beside it")
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > 0.1:
        notes.append(f"gantry tilt of {tilt:.1f} degrees: slices are shifted against each other, and stay so")
    return ordered, step


def _by_number(path: Path, planes: Sequence[Plane], notes: list[str]) -> list[Plane]:
    first = planes[0]
    if len(planes) > 1 and first.frames == 1:
        if first.modality not in _SLICED:
            raise ValueError(
                f"{path} must be slices with a position in the patient, got {len(planes)} separate images "
                f"({first.modality or 'modality unknown'}); read them one by one"
            )
        notes.append("slices have no position in the patient: they are in the order of their numbers")
    elif len(planes) > 1:
        notes.append("frames have no position in the patient: they are in the order of the file")
    return sorted(planes, key=lambda plane: (plane.order, str(plane.path)))
