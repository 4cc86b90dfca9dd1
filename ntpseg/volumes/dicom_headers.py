"""Reading DICOM headers: what one slice needs to be placed, scaled and displayed, and nothing that tells whose it is.

Of a file only the elements of `TAGS` are parsed, so names, dates and descriptions never reach this package's memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.volumes.contents import kind_of
from ntpseg.volumes.dicom_terms import BODY_PARTS, MODALITIES
from ntpseg.volumes.extras import require

Vector = tuple[float, ...]
_SETTING = threading.RLock()

# The UIDs only tell which files belong together; they stay in memory.
_WANTED = """
SOPClassUID SOPInstanceUID SeriesInstanceUID SeriesNumber InstanceNumber AcquisitionNumber ImageType Modality
BodyPartExamined BurnedInAnnotation Rows Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation
BitsAllocated BitsStored PixelRepresentation RescaleSlope RescaleIntercept WindowCenter WindowWidth VOILUTFunction
VOILUTSequence ImagePositionPatient ImageOrientationPatient SliceLocation PixelSpacing ImagerPixelSpacing
EstimatedRadiographicMagnificationFactor SliceThickness SpacingBetweenSlices SequenceOfUltrasoundRegions
DetectorInformationSequence TemporalPositionIdentifier EchoNumbers EchoTime DiffusionBValue TriggerTime
SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
"""
TAGS = tuple(_WANTED.split())
# Objects with Rows and Columns that are no images: segmentations, RT dose.
_NO_IMAGES = ("1.2.840.10008.5.1.4.1.1.66.", "1.2.840.10008.5.1.4.1.1.481.")
# Further than this, a pixel spacing in millimetres is a mistake of whoever wrote the header.
_SPACING_MM = (1e-3, 50.0)
_CENTIMETRES = 3  # of PhysicalUnitsXDirection
_PHASES = (
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "EchoNumbers",
    "EchoTime",
    "DiffusionBValue",
    "TriggerTime",
)


@dataclass(frozen=True, slots=True)
class Plane:
    """One slice: a file, or one frame of a file.

    Attributes:
        path: its file.
        frame: index of the frame.
        frames: number of frames of the file.
        series, instance: UIDs, to tell which files belong together; "" where absent.
        number: SeriesNumber; None where absent.
        order: InstanceNumber, or the frame's index.
        modality, body_part, burnt_in, inverted: see `Header`.
        size: rows and columns.
        colour: whether its pixels become RGB.
        localizer: whether it is a scout view.
        position: of the first pixel in the patient, mm, LPS; None where unknown.
        orientation: direction of the rows and of the columns, 6 numbers; None where unknown.
        spacing: mm between rows and between columns; None where unknown or implausible.
        thickness: mm to the next slice as the header says; None where it does not.
        slope, intercept: to the modality's unit.
        bits, signed: stored bits of a pixel, and whether they have a sign.
        windows: ``(low, high)`` of its windows.
        phase: values of tags that differ between the phases, echoes or b-values of one series.
        notes: what is odd.
    """

    path: Path
    frame: int
    frames: int
    series: str = field(repr=False)
    instance: str = field(repr=False)
    number: int | None
    order: int
    modality: str
    body_part: str
    burnt_in: bool | None
    inverted: bool
    size: tuple[int, int]
    colour: bool
    localizer: bool
    position: Vector | None
    orientation: Vector | None
    spacing: tuple[float, float] | None
    thickness: float | None
    slope: float
    intercept: float
    bits: int
    signed: bool
    windows: tuple[tuple[float, float], ...]
    phase: tuple[str, ...] = field(repr=False)
    notes: tuple[str, ...]


def read_planes(path: Path) -> list[Plane]:
    """The slices of a DICOM file, pixels not read; none where it holds no image or is no DICOM file.

    Raises:
        ValueError: its header is damaged or contradicts itself; the message names it.
    """
    if kind_of(path) != "dicom":
        return []
    pydicom = require("pydicom", "medical", "reading DICOM")
    try:
        with unvalidated():
            dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS), force=True)
            if not ("Rows" in dataset and "Columns" in dataset) or _text(dataset, "SOPClassUID").startswith(_NO_IMAGES):
                return []
            return _planes(path, dataset)
    except ValueError:
        raise
    except Exception as error:  # pydicom raises anything on a damaged header
        raise ValueError(f"{path} must be a readable DICOM file, got a damaged header; copy it again") from error


@contextmanager
def unvalidated() -> Iterator[None]:
    """Keep pydicom from logging the values that break the standard's rules on their form: a name may stand in any."""
    config = require("pydicom.config", "medical", "reading DICOM")
    # The setting is the process's: threads that leave the block in another order would restore a wrong one.
    with _SETTING, config.disable_value_validation():
        yield


def _planes(path: Path, dataset: Any) -> list[Plane]:
    frames = int(_number(dataset.get("NumberOfFrames")) or 1)
    groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
    if groups and len(groups) != frames:
        raise ValueError(f"{path} must describe each of its {frames} frames, got {len(groups)} descriptions")
    shared = (list(dataset.get("SharedFunctionalGroupsSequence") or []) or [None])[0]
    planes = []
    for index in range(frames):
        planes.append(_plane(path, dataset, index, frames, groups[index] if groups else None, shared))
    return planes


def _plane(path: Path, dataset: Any, index: int, frames: int, group: Any, shared: Any) -> Plane:
    def macro(sequence: str, tag: str) -> Any:
        """A tag of the frame's functional groups, of the shared ones, or of the file."""
        for place in (group, shared):
            items = place.get(sequence) if place is not None else None
            if items and items[0].get(tag) not in (None, ""):
                return items[0].get(tag)
        return dataset.get(tag)

    photometric = _text(dataset, "PhotometricInterpretation")
    notes: list[str] = []
    slope = _number(macro("PixelValueTransformationSequence", "RescaleSlope"))
    intercept = _number(macro("PixelValueTransformationSequence", "RescaleIntercept"))
    if slope == 0:
        raise ValueError(f"{path} must have a RescaleSlope that is not 0, got 0")
    position = _vector(macro("PlanePositionSequence", "ImagePositionPatient"), 3)
    orientation = _orientation(macro("PlaneOrientationSequence", "ImageOrientationPatient"))
    spacing = _spacing(dataset, macro("PixelMeasuresSequence", "PixelSpacing"), notes)
    between = macro("PixelMeasuresSequence", "SpacingBetweenSlices")
    thickness = _millimetres(between) or _millimetres(macro("PixelMeasuresSequence", "SliceThickness"))
    if frames > 1 and group is None:
        position, orientation = _frame_place(dataset, index, _millimetres(between))
    kind = [str(value).upper() for value in (macro("CTImageFrameTypeSequence", "FrameType") or ())]
    return Plane(
        path=path,
        frame=index,
        frames=frames,
        series=_text(dataset, "SeriesInstanceUID"),
        instance=_text(dataset, "SOPInstanceUID"),
        number=_whole(dataset.get("SeriesNumber")),
        order=index if frames > 1 else _whole(dataset.get("InstanceNumber")) or 0,
        modality=_code(dataset, "Modality", MODALITIES),
        body_part=_code(dataset, "BodyPartExamined", BODY_PARTS).lower(),
        burnt_in={"YES": True, "NO": False}.get(_text(dataset, "BurnedInAnnotation").upper()),
        inverted=photometric == "MONOCHROME1",
        size=(int(dataset.Rows), int(dataset.Columns)),
        colour=int(dataset.get("SamplesPerPixel") or 1) > 1 or photometric == "PALETTE COLOR",
        localizer="LOCALIZER" in [*_type(dataset), *kind],
        position=position,
        orientation=orientation,
        spacing=spacing,
        thickness=thickness,
        slope=1.0 if slope is None else slope,
        intercept=_number(intercept) or 0.0,
        bits=int(dataset.get("BitsStored") or dataset.get("BitsAllocated") or 16),
        signed=bool(dataset.get("PixelRepresentation")),
        windows=_windows(dataset, macro, notes),
        phase=_phase(dataset, group),
        notes=tuple(notes),
    )


def _frame_place(dataset: Any, index: int, step: float | None) -> tuple[Vector | None, Vector | None]:
    """Where a frame of a plain multi-frame file lies: known for nuclear medicine only, a film has no places."""
    detectors = list(dataset.get("DetectorInformationSequence") or [])
    source = detectors[0] if len(detectors) == 1 else dataset
    position = _vector(source.get("ImagePositionPatient"), 3)
    orientation = _orientation(source.get("ImageOrientationPatient"))
    if (
        position is None
        or orientation is None
        or step is None
        or _code(dataset, "Modality", MODALITIES) not in ("NM", "PT", "CT")
    ):
        return None, None
    normal = np.cross(orientation[:3], orientation[3:])
    return tuple(np.asarray(position) + index * step * normal), orientation


def _spacing(dataset: Any, value: Any, notes: list[str]) -> tuple[float, float] | None:
    """Millimetres between rows and columns; of a projection without calibration, those at the detector."""
    numbers = _vector(value, 2)
    if numbers is None and (numbers := _vector(dataset.get("ImagerPixelSpacing"), 2)) is not None:
        magnification = _number(dataset.get("EstimatedRadiographicMagnificationFactor")) or 1.0
        numbers = tuple(value / magnification for value in numbers) if magnification > 0 else numbers
        if magnification == 1:
            notes.append("millimetres are those at the detector, larger than in the patient")
    regions = list(dataset.get("SequenceOfUltrasoundRegions") or [])
    if numbers is None and len(regions) == 1:
        region = regions[0]
        if region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == _CENTIMETRES:
            deltas = (region.get("PhysicalDeltaY"), region.get("PhysicalDeltaX"))
            numbers = tuple(abs(10 * (_number(delta) or 0.0)) for delta in deltas)
    if numbers is None:
        return None
    if not all(_SPACING_MM[0] <= number <= _SPACING_MM[1] for number in numbers):
        notes.append(f"a pixel spacing of {numbers[0]:g} x {numbers[1]:g} mm is not believed: lengths are unknown")
        return None
    return numbers[0], numbers[1]


def _windows(dataset: Any, macro: Any, notes: list[str]) -> tuple[tuple[float, float], ...]:
    """``(low, high)`` of each window, PS3.3 C.11.2.1.2; of a table, the range of its entries."""
    centers, widths = (_numbers(macro("FrameVOILUTSequence", tag)) for tag in ("WindowCenter", "WindowWidth"))
    function = str(macro("FrameVOILUTSequence", "VOILUTFunction") or "LINEAR").upper()
    windows = []
    for center, width in zip(centers, widths):
        linear = function == "LINEAR" and width > 1
        middle, half = (center - 0.5, (width - 1) / 2) if linear else (center, width / 2)
        if math.isfinite(middle) and math.isfinite(half) and half > 0:
            windows.append((middle - half, middle + half))
    if windows and function == "SIGMOID":
        notes.append("the header's window is a sigmoid; the straight line through its middle is used")
    tables = list(dataset.get("VOILUTSequence") or [])
    if not windows and tables and (described := _numbers(tables[0].get("LUTDescriptor"))):
        windows.append((described[1], described[1] + (described[0] or 65536) - 1))
        notes.append("the header's window is a table; the range of its entries is used")
    return tuple(windows)


def _phase(dataset: Any, group: Any) -> tuple[str, ...]:
    values = [str(dataset.get(tag, "")) for tag in _PHASES] + ["/".join(_type(dataset))]
    for sequence, tag in (
        ("FrameContentSequence", "TemporalPositionIndex"),
        ("FrameContentSequence", "StackID"),
        ("MREchoSequence", "EffectiveEchoTime"),
        ("MRDiffusionSequence", "DiffusionBValue"),
        ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    ):
        items = group.get(sequence) if group is not None else None
        values.append(str(items[0].get(tag, "")) if items else "")
    return tuple(values)


def _orientation(value: Any) -> Vector | None:
    numbers = _vector(value, 6)
    if numbers is None:
        return None
    rows, columns = np.array(numbers[:3]), np.array(numbers[3:])
    lengths = np.linalg.norm(rows), np.linalg.norm(columns)
    if min(lengths) < 0.5 or abs(rows @ columns) > 0.01:
        return None
    return (*(float(v) for v in rows / lengths[0]), *(float(v) for v in columns / lengths[1]))


def _type(dataset: Any) -> list[str]:
    value = dataset.get("ImageType") or ()
    return [str(part).upper() for part in ([value] if isinstance(value, str) else value)]


def _text(dataset: Any, tag: str) -> str:
    return str(dataset.get(tag) or "").strip()


def _code(dataset: Any, tag: str, terms: frozenset[str]) -> str:
    """A code, where it is one of `terms`; anything else, in which a name might stand, is dropped."""
    text = _text(dataset, tag).strip().upper()
    return text if text in terms else ""


def _numbers(value: Any) -> list[float]:
    if value is None or isinstance(value, bytes):
        return []
    values = [value] if isinstance(value, (str, int, float)) or not hasattr(value, "__iter__") else list(value)
    try:
        return [float(v) for v in values]
    except (TypeError, ValueError):
        return []


def _number(value: Any) -> float | None:
    numbers = _numbers(value)
    return numbers[0] if numbers and math.isfinite(numbers[0]) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _vector(value: Any, length: int) -> Vector | None:
    numbers = _numbers(value)
    return tuple(numbers) if len(numbers) == length and all(map(math.isfinite, numbers)) else None


def _millimetres(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and _SPACING_MM[0] <= number <= 4 * _SPACING_MM[1] else None
