"""LanGuideMedSeg's layout: ``prompt/{train,test}.csv`` beside folders of ``Images`` and ``GTs`` or ``Ground-truths``.

After https://github.com/Junelin2333/LanGuideMedSeg-MICCAI2023 and the Kaggle release of QaTa-COV19-v2 it reads. The
tables have the columns Image (the mask's name) and Description. The folders of a split lie in ``Train``, ``Train Set``,
``Train_Folder`` (or test), or all images lie directly in the data set's folder. Without ``val.csv`` the last fifth of
the rows of ``train.csv`` is the validation split, as in that code.
"""

from __future__ import annotations

from pathlib import Path

from ntpseg.data import problems
from ntpseg.data.layouts.base import Layout, Listing
from ntpseg.data.layouts.columns import read_rows
from ntpseg.data.layouts.folders import IMAGE_FOLDERS, MASK_FOLDERS, find_subfolder
from ntpseg.data.layouts.pairing import SplitFolder, join_rows, report_faults, report_unmatched
from ntpseg.data.tables import Rows

TRAIN_FRACTION = 0.8
_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
TABLES = {
    split: tuple(f"{name}{suffix}" for suffix in (".csv", ".xlsx", ".tsv") for name in names)
    for split, names in _NAMES.items()
}
FOLDERS = {
    "train": ("train", "train set", "train_folder", "train_set"),
    "val": ("val", "valid", "val set", "val_folder", "val_set", "validation"),
    "test": ("test", "test set", "test_folder", "test_set"),
}


def matches_languide(root: Path) -> bool:
    """Whether `root` has a ``prompt`` folder with a table."""
    prompt = find_subfolder(root, ("prompt",))
    return prompt is not None and any((prompt / name).is_file() for names in TABLES.values() for name in names)


def read_languide(root: Path) -> Listing:
    """List a data set in LanGuideMedSeg's layout; opens its tables, but no image.

    Args:
        root: the folder that holds ``prompt``.

    Raises:
        ValueError: there is no ``prompt`` folder.
    """
    prompt = find_subfolder(root, ("prompt",))
    if prompt is None:
        raise ValueError(f"path must hold prompt/train.csv in LanGuideMedSeg's layout, got {root}")
    listing = Listing(root)
    rows: dict[str, Rows] = {}
    for split, names in TABLES.items():
        path = next((prompt / name for name in names if (prompt / name).is_file()), None)
        if path is None:
            continue
        try:
            table = read_rows(path)
        except ValueError as error:
            listing.report(problems.UNREADABLE, split, path, str(error.__cause__ or error))
        else:
            rows[split] = table.rows
            report_faults(split, table, listing)
    folders = {split: SplitFolder.open(path) for split in TABLES if (path := _folder(root, split))}
    if not any((prompt / name).is_file() for name in TABLES["val"]) and "train" in rows:
        cut = int(TRAIN_FRACTION * len(rows["train"]))
        rows["train"], rows["val"] = rows["train"][:cut], rows["train"][cut:]
        if "train" in folders:
            folders["val"] = folders["train"]
    described: set[tuple[str, str]] = set()
    for split, split_rows in rows.items():
        split_folders = [folders[split]] if split in folders else []
        described |= join_rows(split, split_rows, split_folders, listing)
    # Folders that several splits share are searched once.
    report_unmatched({id(folder): (split, folder) for split, folder in folders.items()}.values(), described, listing)
    return listing


def _folder(root: Path, split: str) -> Path | None:
    """The folder that holds a split's images and masks."""
    for place in (find_subfolder(root, FOLDERS[split]), root):
        if place is not None and find_subfolder(place, IMAGE_FOLDERS) and find_subfolder(place, MASK_FOLDERS):
            return place
    return None


LANGUIDE = Layout("languide", matches_languide, read_languide, "prompt/train.csv")
