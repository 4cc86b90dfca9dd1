"""LViT's layout: ``{Train,Val,Test}_Folder/{img,labelcol}`` with ``*_text.xlsx`` tables.

After https://github.com/HUANGLIZI/LViT. A table has the columns Image and Description. ``Train_text.xlsx`` (and so on)
covers its own folder and lies in it or beside it; ``Train_Val_text.xlsx`` covers training and validation together,
and ``Train_ID.xlsx`` / ``Val_ID.xlsx`` (column Image) say which row is whose; without them the folder that
holds a row's image does. RecLMIS (https://github.com/ShawnHuang497/RecLMIS) reads the same files. The folders may also
be those of QaTa-COV19-v2 at Kaggle, ``{Train,Test} Set/{Images,Ground-truths}``, with LViT's tables in them, in a
folder ``Text`` of theirs, or beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ntpseg.data import problems
from ntpseg.data.layouts.base import Layout, Listing
from ntpseg.data.layouts.columns import read_rows
from ntpseg.data.layouts.folders import find_subfolder, normalise_name
from ntpseg.data.layouts.pairing import SplitFolder, join_rows, report_faults, report_unmatched
from ntpseg.data.records import SPLITS, case_of
from ntpseg.data.tables import Rows

BOTH = "train_val"
TEXT_TABLE = re.compile(r"(train[ _-]?val|train|val|test)[ _-]?text.*\.(xlsx|xlsm|csv|tsv)", re.IGNORECASE)
OTHER_TABLE = re.compile(
    r"(train[ _-]?val|train|val|test)[ _-]?text.*\.(xls|xlsb|ods|txt|docx?|json|html?|numbers|gz|zip)", re.IGNORECASE
)
ID_TABLE = re.compile(r"(train|val|test)[ _-]?ids?\.(xlsx|csv|tsv)", re.IGNORECASE)


def matches_lvit(root: Path) -> bool:
    """Whether `root` has a folder of LViT's naming, or of Kaggle's with a table of LViT's naming."""
    if not root.is_dir():
        return False
    if any(find_subfolder(root, (f"{split}_folder",)) for split in SPLITS):
        return True
    return any(TEXT_TABLE.fullmatch(path.name) for folder in _places(root, _folders(root)) for path in folder.iterdir())


def read_lvit(root: Path) -> Listing:
    """List a data set in LViT's layout; opens its tables, but no image.

    Args:
        root: the folder that holds ``Train_Folder`` and the others.

    Raises:
        ValueError: `root` has none of these folders.
    """
    paths = _folders(root)
    if not paths:
        raise ValueError(f"path must hold Train_Folder, Val_Folder or Test_Folder in LViT's layout, got {root}")
    listing = Listing(root)
    folders = {split: SplitFolder.open(path) for split, path in paths.items()}
    texts, ids = _tables(_places(root, paths), listing)
    shared = _assign_splits(texts.get(BOTH, []), ids, folders, listing)
    described: set[tuple[str, str]] = set()
    for split in SPLITS:
        # A table of one split has precedence over the shared one.
        rows = texts.get(split) or shared.get(split, [])
        split_folders = [folders[split]] if split in folders else []
        if split_folders and not rows:
            tables = f"{split.capitalize()}_text.xlsx" + ("" if split == "test" else " or Train_Val_text.xlsx")
            others = sorted(path.name for place in _places(root, paths) for path in _other_tables(place, split))
            hint = f"; {', '.join(others)} is not read: save it as .xlsx, or as CSV in UTF-8" if others else ""
            listing.report(problems.MISSING_TABLE, split, paths[split], f"no {tables} has a row for it{hint}")
        # The ID lists may split images that all lie in Train_Folder.
        other_folders = [folder for name, folder in folders.items() if name != split]
        if split in ids or not split_folders:
            split_folders += other_folders
        described |= join_rows(split, rows, split_folders, listing)
    without_table = {problem.split for problem in listing.problems if problem.kind == problems.MISSING_TABLE}
    report_unmatched(
        ((split, folder) for split, folder in folders.items() if split not in without_table), described, listing
    )
    return listing


def _folders(root: Path) -> dict[str, Path]:
    names = {split: tuple(f"{split}{end}" for end in ("_folder", " set", "_set")) for split in SPLITS}
    return {split: path for split in SPLITS if (path := find_subfolder(root, names[split]))}


def _places(root: Path, folders: dict[str, Path]) -> list[Path]:
    """Where tables may lie."""
    if not folders:
        return []
    inside = [path for folder in folders.values() if (path := find_subfolder(folder, ("text", "texts")))]
    return [root, *folders.values(), *inside]


def _other_tables(folder: Path, split: str) -> list[Path]:
    """Files in `folder` that would be the table of `split` if they were of a kind that is read."""
    found = ((path, OTHER_TABLE.fullmatch(path.name)) for path in folder.iterdir())
    return [path for path, match in found if match and split in match.group(1).lower()]


def _tables(places: Iterable[Path], listing: Listing) -> tuple[dict[str, Rows], dict[str, set[str]]]:
    """The rows of every text table, and the cases of every ID list, by the split in the file's name."""
    texts: dict[str, Rows] = {}
    ids: dict[str, set[str]] = {}
    for path in (path for folder in places for path in sorted(folder.iterdir())):
        text, listed = TEXT_TABLE.fullmatch(path.name), ID_TABLE.fullmatch(path.name)
        try:
            if text:
                split = text.group(1).lower()
                split = split if split in SPLITS else BOTH
                table = read_rows(path)
                texts.setdefault(split, []).extend(table.rows)
                report_faults("" if split == BOTH else split, table, listing)
            elif listed:
                table = read_rows(path, described=False)
                report_faults("", table, listing)
                names = (row["image"] for row in table.rows)
                ids.setdefault(listed.group(1).lower(), set()).update(case_of(normalise_name(name)) for name in names)
        except ValueError as error:
            listing.report(problems.UNREADABLE, "", path, str(error.__cause__ or error))
    return texts, ids


def _assign_splits(
    rows: Rows, ids: dict[str, set[str]], folders: dict[str, SplitFolder], listing: Listing
) -> dict[str, Rows]:
    """Assign the rows of ``Train_Val_text.xlsx`` to train and val."""
    assigned: dict[str, Rows] = {"train": [], "val": []}
    for row in rows:
        case = case_of(normalise_name(row["image"]))
        if ids:
            splits = [split for split in assigned if case in ids.get(split, ())]
        else:
            splits = [split for split in assigned if split in folders and folders[split].images.find(case)]
        if splits:
            assigned[splits[0]].append(row)
        if len(splits) > 1:
            listing.report(problems.DUPLICATE, "val", row["image"], "it is in train as well, where it counts")
        elif not splits and ids:
            listing.report(problems.NO_SPLIT, "", row["image"], "neither Train_ID nor Val_ID lists it")
        elif not splits:
            listing.report(problems.MISSING_IMAGE, "", row["image"], "the table names it, but there is no such image")
    return assigned


LVIT = Layout("lvit", matches_lvit, read_lvit, "Train_Folder/img")
