"""What kind of volume a file holds, told by its first bytes and not by its name."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal

Kind = Literal["dicom", "nifti", "nrrd", "metaimage"]
_START = 400


def kind_of(path: Path) -> Kind | None:
    """The kind of a file by its content; None for any other file, and one that cannot be opened."""
    try:
        with path.open("rb") as file:
            start = file.read(_START)
        if start[:2] == b"\x1f\x8b":
            with gzip.open(path) as unpacked:
                start = unpacked.read(_START)
    except (OSError, EOFError, zlib.error):
        return "nifti" if path.name.lower().endswith((".nii.gz", ".nii")) and path.is_file() else None
    if start[128:132] == b"DICM" or _is_bare_dicom(start):
        return "dicom"
    if start[344:347] in (b"n+1", b"ni1") or start[4:7] in (b"n+2", b"ni2"):
        return "nifti"
    if start[:4] == b"NRRD":
        return "nrrd"
    if (b"ObjectType" in start[:200] and b"NDims" in start) or start[:5] == b"NDims":
        return "metaimage"
    return None


def _is_bare_dicom(start: bytes) -> bool:
    """Whether a file begins with a DICOM data set, without the preamble that PS3.10 asks for."""
    if len(start) < 16 or start[:2] not in (b"\x08\x00", b"\x02\x00") or start[3] != 0:
        return False
    # Explicit: two capitals of the value representation; implicit: a length that fits a first element.
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    return explicit or int.from_bytes(start[4:8], "little") < _START
