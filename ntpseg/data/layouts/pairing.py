"""Joining a table's rows with the images and masks of a split's folders (LViT's and LanGuideMedSeg's layouts)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ntpseg.data import problems
from ntpseg.data.layouts.base import Listing
from ntpseg.data.layouts.folders import IMAGE_FOLDERS, MASK_FOLDERS, FolderIndex, find_subfolder, normalise_name
from ntpseg.data.records import MASK_PREFIX, Record, case_of, subject_of
from ntpseg.data.tables import Rows


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
        images, masks = find_subfolder(folder, IMAGE_FOLDERS), find_subfolder(folder, MASK_FOLDERS)
        return cls(FolderIndex(images, masks=False), FolderIndex(masks, masks=True))


def join_rows(split: str, rows: Rows, folders: Sequence[SplitFolder], listing: Listing) -> set[tuple[str, str]]:
    """Turn rows (keys image, description, perhaps subject) into records of `listing`, or into its problems.

    Args:
        split: the rows' split.
        rows: the image column may hold the image's or the mask's name, with another extension or none.
        folders: where to look, the split's own first.
        listing: receives the records and the problems.

    Returns:
        The files that have a row, as (folder, case).
    """
    seen: set[str] = set()
    described: set[tuple[str, str]] = set()
    for number, row in enumerate(rows, start=1):
        name, text = row["image"], row["description"]
        if not name:
            listing.report(problems.MISSING_IMAGE, split, f"row {number} of the {split} rows", "its image is empty")
            continue
        case = case_of(normalise_name(name))
        if case in seen:
            listing.report(problems.DUPLICATE, split, name, "the table names it more than once; the first row counts")
            continue
        seen.add(case)
        image = _first(folder.images.find(name.removeprefix(MASK_PREFIX)) for folder in folders)
        mask = _first(folder.masks.find(name) for folder in folders)
        if image is not None:
            described.add((str(image.parent), case))
        if image is None:
            listing.report(problems.MISSING_IMAGE, split, name, "the table names it, but there is no such image")
        elif not text:
            listing.report(problems.MISSING_TEXT, split, image, "its caption is empty")
        elif mask is None:
            listing.report(problems.MISSING_MASK, split, image, f"no mask of this name{_location(folders, listing)}")
        else:
            subject = row.get("subject") or subject_of(case)
            listing.records.append(Record(image, mask, text, split, case, subject))
    return described


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


def _location(folders: Sequence[SplitFolder], listing: Listing) -> str:
    place = next((folder.masks.folder for folder in folders if folder.masks.folder is not None), None)
    return f" in {listing.short(place)}" if place is not None else "; there is no folder of masks"
