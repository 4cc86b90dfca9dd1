"""MS-CXR: phrases of chest X-ray reports and the boxes they refer to, on the images of MIMIC-CXR-JPG.

::

    SRC/MS_CXR_Local_Alignment_v1.1.0.csv     or the COCO file of the same name (.json); or the file itself as SRC
    SRC/files/p10/p10000032/s50414267/....jpg

After https://physionet.org/content/ms-cxr/ : columns dicom_id, category_name, label_text, path, x, y, w, h,
image_width, image_height and, since 1.1.0, split. The images may also lie where PhysioNet's downloads put them: in
``mimic-cxr-jpg/VERSION/files`` beside SRC or above it. Images of another size (a resized copy) are taken as they are,
and the boxes are scaled to them.

All boxes of one phrase in an image are one mask. Subjects are MIMIC's (p10000032).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ntpseg.importers.base import Case
from ntpseg.importers.boxes import cases_of, find_table, read_boxes
from ntpseg.importers.options import ImportOptions

# The table has the box's integers, the COCO file its fractions too; either does.
_PATTERNS = ("MS_CXR*.csv", "MS_CXR*.json", "*.csv", "*.json")
_SUBJECT = re.compile(r"(?:^|/)(p\d{8})(?:/|$)")
_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".dcm")
_ABOVE = 4


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the images of MS-CXR.

    Raises:
        ValueError: there is no such table, the images are not there, or a patient is in two splits.
    """
    table = find_table(source, _PATTERNS)
    boxes = read_boxes(table, options)
    splits: dict[str, str] = {}
    for box in boxes:
        whose = _subject(box.image)
        if box.split and splits.setdefault(whose, box.split) != box.split:
            raise ValueError(
                f"{box.where} must have its patient in one split, got {box.split}, and {splits[whose]} in other rows; "
                "correct the column split, or delete it: then patients are dealt out as --splits says"
            )
    roots = list(_roots(table.parent.resolve()))
    root = next((root for root in roots for box in boxes[:20] if _image(root, box.image)), None)
    if root is None:
        raise ValueError(
            f"source must have the images of MIMIC-CXR-JPG, got no {boxes[0].image} in {table.parent}, nor in a folder "
            f"mimic-cxr-jpg beside it; link MIMIC-CXR-JPG's folder files into {table.parent}"
        )
    return cases_of(
        [replace(box, subject=_subject(box.image)) for box in boxes], lambda name: _image(root, name), _subject, "DX"
    )


def _roots(folder: Path) -> Iterator[Path]:
    """Folders that may hold ``files``: the table's own, and those of downloads beside and above it."""
    for place in (folder, *list(folder.parents)[:_ABOVE]):
        yield place
        for name in ("mimic-cxr-jpg", "MIMIC-CXR-JPG", "mimic-cxr"):
            download = place / name
            if download.is_dir():
                yield download
                yield from sorted((path for path in download.iterdir() if path.is_dir()), reverse=True)


def _image(root: Path, name: str) -> Path | None:
    """The image of a path of the table, whatever its extension."""
    path = root / name.replace("\\", "/")
    stem = path.with_suffix("") if path.suffix.lower() in _SUFFIXES[1:] else path
    tried = (path, *(Path(f"{stem}{suffix}") for suffix in _SUFFIXES[1:]))
    return next((found for found in tried if found.is_file()), None)


def _subject(image: str) -> str:
    match = _SUBJECT.search(image.replace("\\", "/"))
    return match.group(1) if match else image
