"""LViT's layout: ``{Train,Val,Test}_Folder/{img,labelcol}`` with ``*_text.xlsx`` tables.

After https://github.com/HUANGLIZI/LViT. A table has the columns Image and Description. ``Train_text.xlsx`` (and so on)
speaks for its own folder and lies in it or beside it; ``Train_Val_text.xlsx`` speaks for training and validation
together, and ``Train_ID.xlsx`` / ``Val_ID.xlsx`` (column Image) say which row is whose; without them the folder that
holds a row's image does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ntpseg.data import problems
from ntpseg.data.folders import IMAGE_FOLDERS, MASK_FOLDERS, FolderIndex, child, normal
from ntpseg.data.listing import Listing
from ntpseg.data.records import SPLITS, Record, case_of, subject_of
from ntpseg.data.tables import Rows, read_table

SPLIT_FOLDERS = {split: (f"{split}_folder",) for split in SPLITS}
TEXT_TABLE = re.compile(r"(train[ _-]?val|train|val|test)[ _-]?text.*\.(xlsx|csv|tsv)", re.IGNORECASE)
ID_TABLE = re.compile(r"(train|val|test)[ _-]?ids?\.(xlsx|csv|tsv|txt)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SplitFolder:
    """One split's images and masks."""

    images: FolderIndex
    masks: FolderIndex

    @classmethod
    def open(cls, folder: Path) -> SplitFolder:
        return cls(
            FolderIndex(child(folder, IMAGE_FOLDERS), masks=False), FolderIndex(child(folder, MASK_FOLDERS), masks=True)
        )


def is_lvit(root: Path) -> bool:
    """Whether `root` has a folder of LViT's naming."""
    return any(child(root, names) for names in SPLIT_FOLDERS.values())


def list_lvit(root: Path) -> Listing:
    """List a data set in LViT's layout; opens its tables, but no image.

    Args:
        root: the folder that holds ``Train_Folder`` and the others.
    """
    listing = Listing(root)
    paths = {split: found for split, names in SPLIT_FOLDERS.items() if (found := child(root, names))}
    folders = {split: SplitFolder.open(path) for split, path in paths.items()}
    texts, ids = _tables(root, list(paths.values()), listing)
    shared = _deal(texts.pop("train_val", []), ids, folders, listing)
    described: set[tuple[str, str]] = set()
    for split in SPLITS:
        # A table of the split's own has precedence over the shared one.
        rows = texts[split] if split in texts else shared.get(split, [])
        if split not in folders and not rows:
            continue
        if split not in texts and not rows:
            listing.report(
                problems.MISSING_TABLE, split, paths[split], f"no {split.capitalize()}_text.xlsx speaks for it"
            )
            continue
        own = folders.get(split)
        others = [own] if own else []
        if split in ids or own is None:
            others += [folders[name] for name in SPLITS if name in folders and name != split]
        described |= _join(split, rows, others, listing)
    _strays(folders, described, listing)
    return listing


def _tables(root: Path, folders: list[Path], listing: Listing) -> tuple[dict[str, Rows], dict[str, set[str]]]:
    """The rows of every text table, and the cases of every ID list, by the split that the file's name tells."""
    texts: dict[str, Rows] = {}
    ids: dict[str, set[str]] = {}
    for folder in (root, *folders):
        for path in sorted(folder.iterdir()):
            text, listed = TEXT_TABLE.fullmatch(path.name), ID_TABLE.fullmatch(path.name)
            if not path.is_file() or not (text or listed):
                continue
            try:
                rows = read_table(path)
            except ValueError as error:
                listing.report(problems.UNREADABLE, "", path, str(error.__cause__ or error))
                continue
            needed = ("image", "description") if text else ("image",)
            if rows and (lacking := [name for name in needed if name not in rows[0]]):
                found = ", ".join(rows[0])
                listing.report(problems.UNREADABLE, "", path, f"no column {', '.join(lacking)}; it has {found}")
            elif text:
                texts.setdefault(
                    re.sub("[ -]", "_", text.group(1).lower()).replace("trainval", "train_val"), []
                ).extend(rows)
            elif listed:
                ids.setdefault(listed.group(1).lower(), set()).update(case_of(normal(row["image"])) for row in rows)
    return texts, ids


def _deal(rows: Rows, ids: dict[str, set[str]], folders: dict[str, SplitFolder], listing: Listing) -> dict[str, Rows]:
    """Deal the rows of ``Train_Val_text.xlsx`` to train and val."""
    dealt: dict[str, Rows] = {"train": [], "val": []}
    for row in rows:
        case = case_of(normal(row["image"]))
        if ids:
            splits = [split for split in dealt if case in ids.get(split, ())]
        else:
            splits = [split for split in dealt if split in folders and folders[split].images.find(case)]
        if len(splits) == 1:
            dealt[splits[0]].append(row)
        elif splits:
            listing.report(problems.DUPLICATE, "", row["image"], "is in both train and val")
        elif ids:
            listing.report(problems.NO_SPLIT, "", row["image"], "neither Train_ID nor Val_ID lists it")
        else:
            listing.report(problems.MISSING_IMAGE, "", row["image"], "no folder has this image")
    return dealt


def _join(split: str, rows: Rows, folders: list[SplitFolder], listing: Listing) -> set[tuple[str, str]]:
    """Turn a split's rows into records; returns the cases that have a caption, each with its image's folder."""
    seen: set[str] = set()
    described: set[tuple[str, str]] = set()
    for row in rows:
        name, text = row["image"], row["description"]
        case = case_of(normal(name))
        if case in seen:
            listing.report(problems.DUPLICATE, split, name, "the table names it more than once; the first row counts")
            continue
        seen.add(case)
        image = next((found for folder in folders if (found := folder.images.find(name_of_image(name)))), None)
        mask = next((found for folder in folders if (found := folder.masks.find(name))), None)
        if image is not None:
            described.add((str(image.parent), case))
        if image is None:
            listing.report(problems.MISSING_IMAGE, split, name, "the table names it, but there is no such image")
        elif not text:
            listing.report(problems.MISSING_TEXT, split, name, "its caption is empty")
        elif mask is None:
            where = folders[0].masks.folder
            listing.report(
                problems.MISSING_MASK, split, image, f"no mask in {listing.short(where) if where else 'labelcol'}"
            )
        else:
            subject = row.get("subject") or subject_of(case)
            listing.records.append(Record(image, mask, text, split, case, subject))
    return described


def name_of_image(name: str) -> str:
    """The image's name where the table holds the mask's: without the ``mask_`` prefix."""
    return name.removeprefix("mask_")


def _strays(folders: dict[str, SplitFolder], described: set[tuple[str, str]], listing: Listing) -> None:
    """Report the files that no row asks for."""
    for split, folder in folders.items():
        for case in sorted(folder.images.cases()):
            path = folder.images.files(case)[0]
            if (str(path.parent), case) not in described:
                listing.report(problems.MISSING_TEXT, split, path, "no table has a row for it")
        everywhere = set().union(*(other.images.cases() for other in folders.values()))
        for case in sorted(folder.masks.cases() - everywhere):
            listing.report(problems.STRAY_MASK, split, folder.masks.files(case)[0], "no image of this name")
