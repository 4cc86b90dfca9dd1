"""What one training pair is: an image, the mask that a sentence refers to, and whose image it is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
)


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
    """

    image: Path
    mask: Path | None
    text: str
    split: str
    case: str
    subject: str
    mask_value: str = ""


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
