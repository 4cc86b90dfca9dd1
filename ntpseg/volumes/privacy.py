"""Signs that an image or its file's name tells whose it is; what is found is named, never repeated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntpseg.volumes.extras import require

# Modalities whose pixels usually carry text: ultrasound, secondary captures, angiography, fluoroscopy, others.
TEXT_MODALITIES = ("US", "SC", "XA", "RF", "OT")
_IDENTITY = ("PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs")
_DICOM_NAME = re.compile(r"[^\W\d_]{2,}\^[^\W\d_]+")
# Shorter parts of names, and of IDs, are in file names by chance.
_SHORTEST = 3


@dataclass(frozen=True, slots=True)
class _Found:
    """Which kinds of identity a path holds; not the identity."""

    name: bool
    number: bool
    birth: bool


def burnt_in_warning(modality: str, burnt_in: bool | None) -> str:
    """What DICOM's BurnedInAnnotation means for the pixels of a modality; "" where there is nothing to warn of."""
    if burnt_in:
        return "the header says that text is burnt into the pixels (BurnedInAnnotation YES)"
    if burnt_in is None and modality in TEXT_MODALITIES:
        return (
            f"text may be burnt into the pixels: usual for {modality}, and the header does not say (BurnedInAnnotation)"
        )
    return ""


def path_warnings(path: Path, parts: Sequence[str]) -> list[str]:
    """What parts of a path tell of the patient in a file's header.

    Args:
        path: a file; only of DICOM the header's name, ID and birth date are compared, in memory.
        parts: names of the file and of folders that are the data set's own.

    Returns:
        Warnings without the name, the ID or the date.
    """
    warnings = []
    if any(_DICOM_NAME.search(part) for part in parts):
        warnings.append("a file or folder name looks like a patient's name (LASTNAME^FIRSTNAME)")
    found = _compared(path, "/".join(parts))
    if found.name:
        warnings.append("a file or folder name holds the patient's name of the header")
    if found.number:
        warnings.append("a file or folder name holds the PatientID of the header")
    if found.birth:
        warnings.append("a file or folder name holds the birth date of the header")
    return warnings


def _compared(path: Path, text: str) -> _Found:
    from ntpseg.volumes.contents import kind_of

    if kind_of(path) != "dicom":
        return _Found(False, False, False)
    pydicom = require("pydicom", "medical", "reading DICOM")
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_IDENTITY), force=True)
        name, birth = _value(dataset, "PatientName"), re.sub(r"\D", "", _value(dataset, "PatientBirthDate"))
        numbers = [_value(dataset, "PatientID"), _value(dataset, "OtherPatientIDs")]
    except Exception:  # a damaged header; reading it says so
        return _Found(False, False, False)
    words = [word for word in re.split(r"[\^=\s,]+", name) if len(word) >= _SHORTEST]
    dates = (birth, f"{birth[6:]}{birth[4:6]}{birth[:4]}", f"{birth[4:6]}{birth[6:]}{birth[:4]}")
    digits = re.sub(r"(?<=\d)[-_. ](?=\d)", "", text)
    return _Found(
        name=any(_holds(text, word) for word in words),
        number=any(_holds(text, number) for number in numbers if len(number) >= _SHORTEST),
        birth=len(birth) == 8 and any(date in digits for date in dates),
    )


def _holds(text: str, word: str) -> bool:
    """Whether a word is in a text, whole: not as a part of a longer word or number."""
    return bool(re.search(rf"(?<![^\W_]){re.escape(word.casefold())}(?![^\W_])", text.casefold()))


def _value(dataset: Any, tag: str) -> str:
    return str(dataset.get(tag) or "").strip()
