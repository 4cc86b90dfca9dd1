"""DICOM series: which files belong together, in which order they lie in the patient, and their voxels.

Order comes from ImagePositionPatient along the slices' normal, never from file names or instance numbers
(DICOM PS3.3 C.7.6.2). Of the header only the tags of `HEADER_TAGS` are read before the pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.volumes.dicom_pixels import kept_header, read_frames, reading
from ntpseg.volumes.extras import require
from ntpseg.volumes.volume import Volume

HEADER_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "InstanceNumber",
    "ImageType",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "PatientID",
)
# Objects with Rows and Columns that are no images: segmentations, dose and presentation states.
_NO_IMAGES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7", "1.2.840.10008.5.1.4.1.1.481.2")
# Gaps between slices that differ by less (of the median gap) are rounding of the header.
_EVEN, _MISSING = 0.02, 1.5
_PARALLEL = 1e-3


@dataclass(frozen=True, slots=True)
class DicomFile:
    """What orders one file among others.

    Attributes:
        path: the file.
        header: its tags of `HEADER_TAGS`; they stay in memory.
    """

    path: Path
    header: Any

    @property
    def frames(self) -> int:
        """Number of frames."""
        return int(self.header.get("NumberOfFrames", 1) or 1)

    @property
    def orientation(self) -> tuple[float, ...] | None:
        """ImageOrientationPatient to 4 digits; None where there is none."""
        values = self.header.get("ImageOrientationPatient")
        return None if not values or len(values) != 6 else tuple(round(float(v), 4) + 0.0 for v in values)

    @property
    def localizer(self) -> bool:
        """Whether this is a scout view, on which the slices were planned."""
        return "LOCALIZER" in (self.header.get("ImageType") or ())


@dataclass(frozen=True, slots=True)
class SeriesInfo:
    """One series of a folder, without anything that tells whose it is.

    Attributes:
        name: what ``series=`` takes: the series' number, with the place in the folder where two have the same.
        modality: DICOM's code.
        slices: number of slices, or frames.
        size: rows and columns.
        files: its files; of a series with a scout view in it, the others.
    """

    name: str
    modality: str
    slices: int
    size: tuple[int, int]
    files: tuple[DicomFile, ...]

    def __str__(self) -> str:
        rows, columns = self.size
        return f"{self.name} ({self.modality or 'unknown modality'}, {self.slices} of {columns} x {rows})"


def list_series(folder: Path) -> list[SeriesInfo]:
    """The series of images in a folder and the folders inside, scout views apart, in the order of their numbers.

    Raises:
        ValueError: pydicom is not installed.
    """
    groups: dict[tuple[Any, ...], list[DicomFile]] = {}
    for file in _images(folder):
        header = file.header
        # Multi-frame objects are volumes of their own; a scout has the series of its slices in some files.
        single = file.path if file.frames > 1 else ""
        key = (str(header.get("SeriesInstanceUID", "")), single, file.localizer, header.Rows, header.Columns)
        groups.setdefault(key, []).append(file)
    ordered = sorted(groups.values(), key=lambda files: (_number(files[0]), str(files[0].path)))
    kept = [files for files in ordered if not files[0].localizer] or ordered
    numbers = [_number(files[0]) for files in kept]
    series = []
    for place, files in enumerate(kept):
        unique = numbers.count(numbers[place]) == 1 and numbers[place] >= 0
        name = str(numbers[place]) if unique else f"#{place + 1}"
        first = files[0]
        slices = sum(file.frames for file in files)
        size = (int(first.header.Rows), int(first.header.Columns))
        series.append(SeriesInfo(name, str(first.header.get("Modality", "")), slices, size, tuple(files)))
    return series


def choose_series(folder: Path, name: str | None) -> SeriesInfo:
    """The only series of a folder, or the one that is named.

    Raises:
        ValueError: there is none, or several and none of them is named; the message lists them.
    """
    series = list_series(folder)
    if not series:
        raise ValueError(f"{folder} must hold DICOM images, got a folder without any")
    listed = "; ".join(str(info) for info in series)
    if name is not None:
        wanted = name.strip()
        found = [info for info in series if info.name == wanted]
        found = found or [series[int(wanted[1:]) - 1] for _ in (0,) if _is_place(wanted, len(series))]
        if not found:
            raise ValueError(f"series must be one of those in {folder}, got {name!r}; there are {listed}")
        return found[0]
    if len(series) > 1:
        raise ValueError(f"{folder} must hold one series, got {len(series)}; choose one with series: {listed}")
    return series[0]


def read_dicom(path: Path, series: str | None = None) -> Volume:
    """Read one series of a folder, one multi-frame file, or one slice.

    Args:
        path: a folder, or a file.
        series: of a folder with several: the name of one, see `list_series`.

    Raises:
        ValueError: there is no image or more than one series; slices are missing, lie in one place or have different
            sizes or directions; pixels cannot be decoded. The message names the file.
    """
    if path.is_dir():
        files = choose_series(path, series).files
    else:
        header = _header(path)
        if header is None:
            raise ValueError(f"{path} must be a DICOM image, got a DICOM file without an image, or a damaged one")
        files = (DicomFile(path, header),)
    if len(files) == 1:
        return _one_file(files[0].path)
    return _stack(path, files)


def _stack(folder: Path, files: Sequence[DicomFile]) -> Volume:
    directions = {file.orientation for file in files}
    if len(directions) > 1:
        raise ValueError(f"slices of a series must have one direction, got {len(directions)} in {folder}")
    placed = None not in directions and all(_position(file) is not None for file in files)
    notes: list[str] = []
    if placed:
        orientation = np.array(files[0].header.ImageOrientationPatient, np.float64)
        ordered, step, notes = _ordered(folder, files, np.cross(orientation[:3], orientation[3:]))
    else:
        ordered, step = sorted(files, key=lambda file: int(file.header.get("InstanceNumber") or 0)), None
        notes.append("slices have no position in the patient: they are in the order of their numbers")
    voxels: np.ndarray | None = None
    first: Any = None
    for index, file in enumerate(ordered):
        dataset = reading(file.path)
        plane = read_frames(file.path, dataset)[0]
        if voxels is None:
            first, voxels = dataset, np.empty((len(ordered), *plane.shape), plane.dtype)
        elif plane.dtype != voxels.dtype:
            voxels = voxels.astype(np.promote_types(voxels.dtype, plane.dtype))
        if plane.shape != voxels.shape[1:]:
            raise ValueError(f"{file.path} must have the size of its series, {voxels.shape[1:]}, got {plane.shape}")
        voxels[index] = plane
    assert voxels is not None
    header, spacing = kept_header(first, tuple(notes), placed=placed)
    return Volume.from_stored(voxels, _affine(first, spacing, step, _position(ordered[0])), header)


def _one_file(path: Path) -> Volume:
    dataset = reading(path)
    frames = read_frames(path, dataset)
    positions, orientation = _frame_places(dataset)
    if positions is None or orientation is None or len(positions) != len(frames):
        single = len(frames) == 1
        notes = () if single else ("frames have no position in the patient: they are in the file's order",)
        header, spacing = kept_header(dataset, notes, placed=single)
        return Volume.from_stored(frames, _affine(dataset, spacing, None, None), header)
    notes_: list[str] = []
    step = None
    if len(frames) > 1:
        normal = np.cross(orientation[:3], orientation[3:])
        order, step, notes_ = _even(path, positions, normal)
        frames, positions = frames[order], positions[order]
    header, spacing = kept_header(dataset, tuple(notes_), placed=True)
    return Volume.from_stored(frames, _affine(dataset, spacing, step, positions[0], orientation), header)


def _ordered(
    folder: Path, files: Sequence[DicomFile], normal: np.ndarray
) -> tuple[list[DicomFile], np.ndarray | None, list[str]]:
    positions = np.array([_position(file) for file in files], np.float64)
    order, step, notes = _even(folder, positions, normal)
    return [files[i] for i in order], step, notes


def _even(path: Path, positions: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """The order of slices along their normal, the step from one to the next in millimetres, and what is odd."""
    along = positions @ (normal / np.linalg.norm(normal))
    order = np.argsort(along, kind="stable")
    if len(order) < 2:
        return order, None, []
    gaps = np.diff(along[order])
    middle = float(np.median(gaps))
    if middle <= 1e-4 or (gaps < 1e-4).any():
        twice = int((gaps < 1e-4).sum())
        raise ValueError(
            f"{path} must have one slice at each place, got {twice} places with more: several phases or echoes? "
            "copy one of them to a folder of its own"
        )
    if (gaps > _MISSING * middle).any():
        at = int(np.argmax(gaps))
        raise ValueError(
            f"{path} must hold every slice of its series, got a gap of {gaps[at]:.4g} mm after slice {at + 1} of "
            f"{len(order)}, others are {middle:.4g} mm; copy it again"
        )
    notes = []
    if (np.abs(gaps - middle) > _EVEN * middle).any():
        notes.append(f"slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart; they are read as evenly spaced")
    ordered = positions[order]
    step = (ordered[-1] - ordered[0]) / (len(order) - 1)
    tilt = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step) / np.linalg.norm(normal), -1, 1)))
    if tilt > 0.1:
        notes.append(f"slices are shifted against each other by a gantry tilt of {tilt:.1f} degrees, which is kept")
    return order, step, notes


def _affine(
    dataset: Any,
    spacing: tuple[float, float, float],
    step: np.ndarray | None,
    position: Sequence[float] | np.ndarray | None,
    orientation: np.ndarray | None = None,
) -> np.ndarray:
    """From (i, j, k, 1) to millimetres; `spacing` is of slices, rows and columns."""
    if orientation is None:
        values = dataset.get("ImageOrientationPatient")
        orientation = np.array(values if values and len(values) == 6 else (1, 0, 0, 0, 1, 0), np.float64)
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * spacing[2]
    affine[:3, 1] = orientation[3:] * spacing[1]
    affine[:3, 2] = np.cross(orientation[:3], orientation[3:]) * spacing[0] if step is None else step
    if position is not None:
        affine[:3, 3] = position
    return affine


def _frame_places(dataset: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Position of every frame and the direction of all, from the functional groups or the file; None where unknown."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if not frames:
        position, orientation = dataset.get("ImagePositionPatient"), dataset.get("ImageOrientationPatient")
        if not position or not orientation or int(dataset.get("NumberOfFrames", 1) or 1) > 1:
            return None, None
        return np.array([position], np.float64), np.array(orientation, np.float64)
    positions, directions = [], set()
    for frame in frames:
        place = _macro(frame, shared, "PlanePositionSequence", "ImagePositionPatient")
        direction = _macro(frame, shared, "PlaneOrientationSequence", "ImageOrientationPatient")
        if place is None or direction is None:
            return None, None
        positions.append([float(value) for value in place])
        directions.add(tuple(round(float(value), 4) for value in direction))
    if len(directions) > 1:
        return None, None
    first = _macro(frames[0], shared, "PlaneOrientationSequence", "ImageOrientationPatient")
    return np.array(positions), np.array(first, np.float64)


def _macro(frame: Any, shared: Any, sequence: str, tag: str) -> Any:
    for group in (frame, shared):
        items = group.get(sequence) if group is not None else None
        if items and items[0].get(tag) is not None:
            return items[0].get(tag)
    return None


def _position(file: DicomFile) -> tuple[float, ...] | None:
    values = file.header.get("ImagePositionPatient")
    return None if not values or len(values) != 3 else tuple(float(value) for value in values)


def _number(file: DicomFile) -> int:
    try:
        return int(file.header.get("SeriesNumber"))
    except (TypeError, ValueError):
        return -1


def _is_place(name: str, count: int) -> bool:
    return name.startswith("#") and name[1:].isdecimal() and 1 <= int(name[1:]) <= count


def _images(folder: Path) -> Iterator[DicomFile]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or name.upper() == "DICOMDIR" or not path.is_file():
                continue
            header = _header(path)
            if header is not None:
                yield DicomFile(path, header)


def _header(path: Path) -> Any:
    """The tags of `HEADER_TAGS` of a DICOM image; None for any other file."""
    from ntpseg.volumes.contents import kind_of

    if kind_of(path) != "dicom":
        return None
    pydicom = require("pydicom", "medical", "reading DICOM")
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER_TAGS), force=True)
    except Exception:  # pydicom raises anything on a damaged header
        return None
    if "Rows" not in header or "Columns" not in header or str(header.get("SOPClassUID", "")) in _NO_IMAGES:
        return None
    return header
