"""Masks of a DICOM series as a DICOM Segmentation object (DICOM PS3.3 A.51), made by highdicom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntpseg.utils.files import atomic_open
from ntpseg.volumes.extras import require
from ntpseg.volumes.geometry import Geometry

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SUFFIX = ".dcm"
SERIES_NUMBER = 100
SERIES_DESCRIPTION = "ntpseg segmentation"
# Of a long string (LO), the type of a segment's label.
MAX_LABEL = 64
# What a segmentation must copy from its source; sources without are incomplete, and an empty value is allowed.
_COPIED = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)
_SEXES = ("M", "F", "O", "")


def write_dicom_seg(
    path: Path, masks: Sequence[np.ndarray], texts: Sequence[str], stored: Geometry, sources: Sequence[Dataset]
) -> None:
    """Write one segment for each sentence; the file appears whole or not at all.

    The standard wants the patient's and the study's fields of the source in the object: they are copied into this file,
    and nowhere else. The object of one sentence has a frame for every slice, that of several sentences only those that
    hold something.

    Args:
        path: the file, ending in ``.dcm``.
        masks: bool ``[D, H, W]`` each, on the grid `stored`.
        texts: the sentences: labels of the segments, cut to 64 characters, and whole their descriptions.
        stored: the grid.
        sources: the headers of the series that the volume was read from, see `source_headers`.

    Raises:
        ValueError: highdicom is not installed, or the sources are not the slices of `stored`.
    """
    headers, order = _ordered(sources, stored)
    # Software that looks at no frame's position sees the grid of the series.
    sparse = len(masks) > 1 and any(mask.any() for mask in masks)
    segmentation = _segmentation(headers, _frames(masks, order), texts, omit_empty_frames=sparse)
    pydicom = require("pydicom", "medical", "writing DICOM-SEG")
    with atomic_open(path) as file:
        pydicom.dcmwrite(file, segmentation, enforce_file_format=True)


def _segmentation(headers: Sequence[Dataset], frames: np.ndarray, texts: Sequence[str], **options: Any) -> Any:
    """highdicom's object; a `ValueError` without anything of the header where that is not as the standard wants."""
    highdicom = require("highdicom", "medical", "writing DICOM-SEG")
    seg = require("highdicom.seg", "medical", "writing DICOM-SEG")
    from pydicom.sr.codedict import codes

    from ntpseg import __version__

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="ntpseg", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    segments = []
    for number, text in enumerate(texts, start=1):
        segment = seg.SegmentDescription(
            segment_number=number,
            segment_label=_label(text),
            # What a sentence means has no code; this is what 3D Slicer gives a segment of unknown kind.
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        segment.SegmentDescription = text[:1024]
        segments.append(segment)
    try:
        return seg.Segmentation(
            source_images=headers,
            pixel_array=frames,
            segmentation_type=seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="ntpseg",
            manufacturer_model_name="ntpseg",
            software_versions=__version__,
            device_serial_number="0",
            series_description=SERIES_DESCRIPTION,
            specific_character_set="ISO_IR 192",
            **options,
        )
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        # What it says may hold a patient's field.
        raise ValueError(
            f"a DICOM-SEG must be of a series whose header is as the standard wants, got one that is not "
            f"({type(error).__name__}); end --out in .nii.gz"
        ) from None


def check_sources(sources: Sequence[Dataset], stored: Geometry) -> None:
    """Raise a `ValueError` unless a segmentation of `stored` can be written with these headers.

    They must be those of its slices, with their positions and with a patient and a study as the standard wants them.
    """
    headers, _ = _ordered(sources, stored)
    headers = headers[:1]
    depth = int(headers[0].get("NumberOfFrames") or 1)
    _segmentation(headers, np.zeros((depth, *stored.shape[1:]), np.uint8), ["check"], omit_empty_frames=False)


def _label(text: str) -> str:
    """A sentence as a long string: a backslash would divide it in two."""
    text = " ".join(text.replace("\\", "/").split())
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def _frames(masks: Sequence[np.ndarray], order: Sequence[int]) -> np.ndarray:
    """The masks in the sources' order: uint8 ``[D, H, W]`` labels, or, if they overlap, ``[D, H, W, N]``."""
    total = np.zeros(masks[0].shape, np.uint16)
    for mask in masks:
        total += mask
    if total.max() > 1 or len(masks) > 255:
        return np.stack(masks, axis=-1)[order].view(np.uint8)
    labels = np.zeros(masks[0].shape, np.uint8)
    for number, mask in enumerate(masks, start=1):
        labels[mask] = number
    return labels[order]


def _ordered(sources: Sequence[Dataset], stored: Geometry) -> tuple[list[Dataset], list[int]]:
    """The headers, complete, and which slice of the grid each of their frames is."""
    known = [str(source.get("FrameOfReferenceUID") or "") for source in sources]
    # One for all: slices of a series share their frame of reference, also where the file does not name it.
    frame = next(filter(None, known), "") or _unknown_frame()
    headers = [_complete(source, frame) for source in sources]
    try:
        positions = [position for header in headers for position in _positions(header)]
    except (AttributeError, IndexError) as error:
        raise ValueError(
            "a DICOM-SEG must be of a series that states its slices' positions, got one without; end --out in .nii.gz"
        ) from error
    # Slices may lie a little unevenly: their order counts, not where exactly they are.
    step = stored.affine[:3, 2] / np.linalg.norm(stored.affine[:3, 2])
    along = (np.asarray(positions, dtype=np.float64) - stored.affine[:3, 3]) @ step
    sizes = {(int(header.Rows), int(header.Columns)) for header in headers}
    half = stored.spacing[0] / 2
    if len(along) != stored.shape[0] or sizes != {tuple(stored.shape[1:])} or abs(along.min()) > half:
        raise ValueError(
            f"a DICOM-SEG must be of the series that was read, {list(stored.shape)} voxels, got {len(along)} slices of "
            f"{sorted(sizes)}; give it alone in a folder"
        )
    return headers, np.argsort(np.argsort(along, kind="stable"), kind="stable").tolist()


def _positions(header: Dataset) -> list[Any]:
    if "NumberOfFrames" not in header:
        if not header.ImagePositionPatient:
            raise AttributeError("ImagePositionPatient")
        return [header.ImagePositionPatient]
    # What all frames have in common stands in one place; of a single frame that may be its position.
    shared = header.SharedFunctionalGroupsSequence[0]
    groups = [g if "PlanePositionSequence" in g else shared for g in header.PerFrameFunctionalGroupsSequence]
    return [group.PlanePositionSequence[0].ImagePositionPatient for group in groups]


def _unknown_frame() -> str:
    from pydicom.uid import generate_uid

    return str(generate_uid())


def _complete(source: Dataset, frame: str) -> Dataset:
    for name in _COPIED:
        if name not in source:
            setattr(source, name, "")
    if source.PatientSex not in _SEXES:
        source.PatientSex = ""
    if not source.get("FrameOfReferenceUID"):
        source.FrameOfReferenceUID = frame
    return source
