"""What one training pair is: an image, the mask that a sentence refers to, and whose image it is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ntpseg.utils.checks import check_choice, check_integer, check_number

SPLITS = ("train", "val", "test")
MASK_PREFIX = "mask_"
_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm")
# A volume under one of the last names is refused where it is opened.
IMAGE_SUFFIXES = (*_PICTURES, ".dcm", ".dicom", ".nii.gz", ".nii")

# A subject is the unit that splits and bootstrap intervals must not cut. Tried in order on a case's name:
SUBJECT_PATTERNS = (
    re.compile(r"^(sub-[A-Za-z0-9]+)_"),  # BIDS names of the BIMCV images in QaTa-COV19: sub-S09345_ses-E17953_...
    re.compile(r"^(cxr_s\d+)-"),  # the same images in ProLearn's release: cxr_s09345-...
    re.compile(r"^(cxr_[0-9a-f]{6,})_"),  # one X-ray with several structures: cxr_0f89c850e9_left-lung
    re.compile(r"^(p1\d{7})_s\d{8}(?![0-9])"),  # MIMIC-CXR, its folders in the name: p10000032_s50414267_02aa804e
    # MosMedData+, slices of one study: Jun_coronacases_case1_119, Jun_radiopaedia_10_85902_3_case12_107,
    # Morozov_study_0003_24. Of its bjorke_12 nothing more is known.
    re.compile(r"^(Jun_\w+_case\d+)_\d+$", re.IGNORECASE),
    re.compile(r"^(Morozov_study_\d+)_\d+$", re.IGNORECASE),
    re.compile(r"^(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})-"),  # MoNuSeg, the patient of a barcode: TCGA-21-5784-01Z-00-DX1
    re.compile(r"^(patient\d{4,5})_"),  # CAMUS and CheXpert: patient0001_2CH_ED, patient64758_study1_view1_frontal
)
# Folders of one patient: sub-01 (BIDS), p10000032 (MIMIC-CXR), patient00001 (CheXpert).
PATIENT_FOLDER = re.compile(r"(sub-[A-Za-z0-9]+|p1\d{7}|patient\d{5})$")


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """How the masks of a data set are read.

    Attributes:
        keep_empty: keep cases without a finding (masks without foreground) instead of taking them for a fault.
        mask_value: the class of label maps whose table has no value of its own in a column ``mask_value``: a number or
            a colour such as "#ff0000"; "" where masks hold one class.

    Raises:
        ValueError: `mask_value` is neither.
    """

    keep_empty: bool = False
    mask_value: str = ""

    def __post_init__(self) -> None:
        check_mask_value("mask_value", self.mask_value)


@dataclass(frozen=True, slots=True)
class SlicePlace:
    """Where an image lies in a patient, and what it shows, as far as the table of its data set states it.

    Attributes:
        volume: name of the volume that the image is a slice of, unique in its data set; "" for a 2-D image.
        axis: "axial", "coronal" or "sagittal", as of `ntpseg.volumes.Volume.slice`; "" for a 2-D image.
        index: of the slice, as of `ntpseg.volumes.Volume.slice`; -1 for a 2-D image.
        slice_mm: millimetres from a slice of the volume to that of the next index; None where they are unknown.
        row_mm: millimetres between the centres of neighbouring rows; None where they are unknown.
        column_mm: millimetres between the centres of neighbouring columns; None where they are unknown.
        window: how the stored values became grey, such as "lung" or "-160..240"; "" where it is unknown.
        modality: such as "CT"; "" where it is unknown.
        structure: what the sentence refers to, such as "left kidney"; "" where it is unknown.

    Raises:
        ValueError: a slice of a volume has no axis or index, or a distance is no positive number.
    """

    volume: str = ""
    axis: str = ""
    index: int = -1
    slice_mm: float | None = None
    row_mm: float | None = None
    column_mm: float | None = None
    window: str = ""
    modality: str = ""
    structure: str = ""

    def __post_init__(self) -> None:
        if self.volume:
            # SciPy with it, which commands that read no table need not wait for.
            from ntpseg.volumes.geometry import AXES

            check_choice("axis", self.axis, AXES)
            check_integer("slice", self.index, 0)
        for name in ("slice_mm", "row_mm", "column_mm"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)

    @property
    def pixel_mm(self) -> tuple[float, float] | None:
        """Millimetres between rows and between columns; None where either is unknown."""
        return None if self.row_mm is None or self.column_mm is None else (self.row_mm, self.column_mm)

    @property
    def voxel_mm(self) -> tuple[float, float, float] | None:
        """Millimetres between slices, rows and columns; None where any is unknown."""
        pixel = self.pixel_mm
        return None if pixel is None or self.slice_mm is None else (self.slice_mm, *pixel)


@dataclass(frozen=True, slots=True)
class Record:
    """One image, one sentence, and the mask of what the sentence refers to.

    Attributes:
        image: path of the image file.
        mask: path of the mask file, or None where only a prediction is wanted.
        text: the sentence.
        split: "train", "val" or "test".
        case: name of the pair, unique within its split (the image's name without `mask_` and without extension).
        subject: the patient (see `subject_of`); the case itself where nothing better is known.
        mask_value: the class of a label map that the sentence refers to (see `ntpseg.data.read_mask`); "": the mask
            holds one class.
        place: where the image lies in a volume and what is known of it; None where the table says nothing of it.
    """

    image: Path
    mask: Path | None
    text: str
    split: str
    case: str
    subject: str
    mask_value: str = ""
    place: SlicePlace | None = None


def case_of(name: str) -> str:
    """The case that a file name stands for: ``mask_a.png``, ``a.tif`` and ``a`` are all case ``a``."""
    name = name.strip()
    stem = name[: -len(suffix)] if (suffix := known_suffix(name)) else name
    return stem.removeprefix(MASK_PREFIX)


def subject_of(case: str) -> str:
    """The subject in a case's name, or the case itself where its name follows no known rule.

    A `subject` column in the table of a data set takes precedence over this.
    """
    for pattern in SUBJECT_PATTERNS:
        if match := pattern.match(case):
            return match.group(1)
    return case


def known_suffix(name: str) -> str:
    """The image extension at the end of `name` as written there, or "" (names may contain other dots)."""
    lowered = name.lower()
    return next((name[-len(suffix) :] for suffix in IMAGE_SUFFIXES if lowered.endswith(suffix)), "")


def check_masks(records: Sequence[Record]) -> None:
    """Raise a `ValueError` if there is no record, or one without a mask."""
    if not records:
        raise ValueError("records must hold at least one image with its mask, got none")
    without = [record.case for record in records if record.mask is None]
    if without:
        names = ", ".join(map(repr, without[:3])) + (" ..." if len(without) > 3 else "")
        raise ValueError(f"records must all have a mask, got {len(without)} without one: {names}")


def check_mask_value(name: str, value: str) -> None:
    """Raise a `ValueError` unless `value` is "", a number or a colour such as "#ff0000"."""
    if value and not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not math.isfinite(number):
            raise ValueError(f"{name} must be a number or a colour such as #ff0000, got {value!r}")
