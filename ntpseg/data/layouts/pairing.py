"""Joining a table's rows with the images and masks of a split's folders (LViT's and LanGuideMedSeg's layouts)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ntpseg.data import problems
from ntpseg.data.layouts.base import Listing
from ntpseg.data.layouts.folders import IMAGE_FOLDERS, MASK_FOLDERS, FolderIndex, find_subfolder, normalise_name
from ntpseg.data.records import MASK_PREFIX, Record, case_of, check_mask_value, subject_of
from ntpseg.data.tables import Rows, Table


@dataclass(frozen=True, slots=True)
class SplitFolder:
    """One split's folders.

    Attributes:
        images: the image files.
        masks: the mask files.
    """

    images: FolderIndex
    masks: FolderIndex

    @classmethod
    def open(cls, folder: Path) -> SplitFolder:
        """List the image and the mask folder inside `folder`."""
        images = FolderIndex(find_subfolder(folder, IMAGE_FOLDERS), masks=False)
        masks = FolderIndex(find_subfolder(folder, MASK_FOLDERS), masks=True)
        masks.adopt(images.cases())
        return cls(images, masks)


def join_rows(split: str, rows: Rows, folders: Sequence[SplitFolder], listing: Listing) -> set[tuple[str, str]]:
    """Turn rows (keys image, description, perhaps subject) into records of `listing`, or into its problems.

    Args:
        split: the rows' split.
        rows: the image column may hold the image's or the mask's name, with another extension or none; a column
            mask_value names the class of a label map.
        folders: where to look, the split's own first.
        listing: receives the records and the problems.

    Returns:
        The files that have a row, as (folder, case).
    """
    seen: set[str] = set()
    described: set[tuple[str, str]] = set()
    for row in rows:
        name = row["image"]
        if not name:
            where = f"row {row.number} of the {split} rows"
            listing.report(problems.MISSING_IMAGE, split, where, f"its image is empty{row.reasons.get('image', '')}")
            continue
        image = _first(folder.images.find(name.removeprefix(MASK_PREFIX)) for folder in folders)
        # The file's own name, where the table spells it in another way.
        case = case_of(normalise_name(name if image is None else image.name))
        if case in seen:
            listing.report(problems.DUPLICATE, split, name, "the table names it more than once; the first row counts")
            continue
        seen.add(case)
        # A mask of exactly this name, else the one that belongs to the image.
        mask = _first(folder.masks.find(wanted) for wanted in dict.fromkeys((name, case)) for folder in folders)
        value = row.get("mask_value", "")
        if image is not None:
            described.add((str(image.parent), case))
        if image is None:
            hint = _first_text(folder.images.hint(name) for folder in folders)
            reason = f"the table names it in row {row.number}, but there is no such image{hint}"
            listing.report(problems.MISSING_IMAGE, split, name, reason)
        elif reason := row.missing_text("description"):
            listing.report(problems.MISSING_TEXT, split, image, f"{reason} (row {row.number})")
        elif mask is None:
            hint = _first_text(folder.masks.hint(case) for folder in folders)
            listing.report(
                problems.MISSING_MASK, split, image, f"no mask of this name{_location(folders, listing)}{hint}"
            )
        elif reason := mask_value_fault(value):
            listing.report(problems.BAD_ROW, split, f"row {row.number} of the {split} rows", reason)
        else:
            subject = row.get("subject") or subject_of(case)
            if row.get("subject"):
                listing.patients.add(subject)
            listing.records.append(Record(image, mask, row["description"], split, case, subject, value))
    return described


def mask_value_fault(value: str) -> str:
    """What is wrong with a cell of the column ``mask_value``; "" where nothing is."""
    try:
        check_mask_value("mask_value", value)
    except ValueError as error:
        return str(error)
    return ""


def report_faults(split: str, table: Table, listing: Listing) -> None:
    """Report the malformed rows of a table, and a table without rows."""
    for number, reason in table.faults:
        listing.report(problems.BAD_ROW, split, f"{listing.short(table.path)} row {number}", reason)
    if not table.rows and not table.faults:
        listing.report(problems.UNREADABLE, split, table.path, "it has a header and no row")


def report_unmatched(
    folders: Iterable[tuple[str, SplitFolder]], described: set[tuple[str, str]], listing: Listing
) -> None:
    """Report the images that no row names, the masks without an image, and files that mean the same case.

    Args:
        folders: (split, folder) pairs.
        described: what `join_rows` returned for all splits.
        listing: receives the problems.
    """
    pairs = list(folders)
    image_cases = set().union(*(folder.images.cases() for _, folder in pairs))
    for split, folder in pairs:
        for case in sorted(folder.images.cases()):
            path = folder.images.files(case)[0]
            if (str(path.parent), case) not in described:
                listing.report(problems.MISSING_TEXT, split, path, "no table has a row for it")
        for case in sorted(folder.masks.cases() - image_cases):
            listing.report(problems.UNMATCHED_MASK, split, folder.masks.files(case)[0], "no image of this name")
        for index in (folder.images, folder.masks):
            for case in sorted(index.cases()):
                for path in index.files(case)[1:]:
                    first = index.files(case)[0].name
                    listing.report(problems.DUPLICATE, split, path, f"{first} has the same name but for the ending")


def _first(paths: Iterable[Path | None]) -> Path | None:
    return next((path for path in paths if path is not None), None)


def _first_text(texts: Iterable[str]) -> str:
    return next((text for text in texts if text), "")


def _location(folders: Sequence[SplitFolder], listing: Listing) -> str:
    place = next((folder.masks.folder for folder in folders if folder.masks.folder is not None), None)
    return f" in {listing.short(place)}" if place is not None else "; there is no folder of masks"
