"""What DICOM files of a folder belong together. Patients become numbers here; their names and IDs go nowhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
_TAGS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PatientID", "PatientName")


@dataclass(slots=True)
class Series:
    """Files of one series.

    Attributes:
        uid: SeriesInstanceUID, for memory only.
        kind: SOPClassUID of its files.
        subject: "subject-0001", ... by the order in which patients are met.
        files: sorted.
        instances: SOPInstanceUID of each file, for memory only.
    """

    uid: str
    kind: str
    subject: str
    files: list[Path] = field(default_factory=list)
    instances: set[str] = field(default_factory=set)


def find_series(folder: Path) -> list[Series]:
    """The series of all DICOM files in a folder and those in it, in the order of their paths; no pixel is read.

    Raises:
        ValueError: pydicom is missing.
    """
    from ntpseg.volumes.extras import require

    pydicom = require("pydicom", "medical", "DICOM")
    found: dict[tuple[str, str], Series] = {}
    subjects: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        except (pydicom.errors.InvalidDicomError, OSError, ValueError, EOFError):
            continue
        uid, kind = str(header.get("SeriesInstanceUID", "")), str(header.get("SOPClassUID", ""))
        if not uid:
            continue
        patient = str(header.get("PatientID", "") or header.get("PatientName", "") or f"file {path.parent}")
        subject = subjects.setdefault(patient, f"subject-{len(subjects) + 1:04d}")
        series = found.setdefault((uid, kind), Series(uid, kind, subject))
        series.files.append(path)
        series.instances.add(str(header.get("SOPInstanceUID", "")))
    return list(found.values())


def source_of(name: str, referenced: Iterable[str], instances: Iterable[str], series: Iterable[Series]) -> Series:
    """The image series that a segmentation was drawn on.

    Args:
        name: of the segmentation's file.
        referenced: SeriesInstanceUIDs that it names.
        instances: SOPInstanceUIDs that it names, for files that name no series.
        series: all of the folder.

    Raises:
        ValueError: it is not in the folder.
    """
    images = [one for one in series if one.kind not in (SEGMENTATION, STRUCTURE_SET)]
    wanted, slices = set(referenced), set(instances)
    for one in images:
        if one.uid in wanted or one.instances & slices:
            return one
    raise ValueError(
        f"{name} must lie with the series that it was drawn on, got {len(images)} other series in the folder"
    )


def referenced_uids(dataset: Any) -> tuple[set[str], set[str]]:
    """SeriesInstanceUIDs and SOPInstanceUIDs that a DICOM object names anywhere in its references."""
    series, instances = set(), set()

    def visit(part: Any) -> None:
        for element in part:
            if element.VR == "SQ":
                for item in element.value:
                    visit(item)
            elif element.keyword == "SeriesInstanceUID":
                series.add(str(element.value))
            elif element.keyword == "ReferencedSOPInstanceUID":
                instances.add(str(element.value))

    keywords = ("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence", "SourceImageSequence")
    for keyword in (*keywords, "ROIContourSequence"):
        for item in dataset.get(keyword, []) or []:
            visit(item)
    return series, instances
