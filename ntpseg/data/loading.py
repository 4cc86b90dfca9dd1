"""Loading a data set of any supported layout."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from ntpseg.data.checks import check_listing
from ntpseg.data.languide import is_languide, list_languide
from ntpseg.data.listing import Listing
from ntpseg.data.lvit import is_lvit, list_lvit
from ntpseg.data.manifest import find_manifest, list_manifest
from ntpseg.data.problems import DataProblems, Problem
from ntpseg.data.records import Record

READERS = {"lvit": list_lvit, "languide": list_languide, "manifest": list_manifest}
LAYOUTS = ("auto", *READERS)


def detect_layout(path: Path) -> str:
    """Tell the layout of a data set by its files and folders.

    Raises:
        ValueError: it has none of the known layouts.
    """
    if path.is_dir() and is_languide(path):
        return "languide"
    if path.is_dir() and is_lvit(path):
        return "lvit"
    if find_manifest(path) is not None:
        return "manifest"
    raise ValueError(
        f"path is {path}, which has none of the known layouts: lvit (Train_Folder/img), languide (prompt/train.csv), "
        "manifest (a CSV file with the columns image, mask, text)"
    )


def list_dataset(path: str | PathLike[str], layout: str = "auto") -> Listing:
    """Read a data set's tables and match them with its files, opening no image.

    Args:
        path: folder of the data set, or a manifest file.
        layout: one of `LAYOUTS`; "auto" tells them apart by their folders.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: `layout` is unknown, or `path` does not have it.
    """
    root = Path(path).expanduser()
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if not root.exists():
        raise FileNotFoundError(f"the data set {root} does not exist")
    return READERS[detect_layout(root) if layout == "auto" else layout](root)


def load_records(path: str | PathLike[str], layout: str = "auto", *, skip_bad: bool = False) -> list[Record]:
    """The pairs of a data set, in the order of its tables: train, val, test.

    Only tables and folders are read here; `usable_records` opens every file as well.

    Args:
        path: folder of the data set, or a manifest file.
        layout: "lvit", "languide", "manifest", or "auto".
        skip_bad: leave bad rows out instead of refusing the data set.

    Raises:
        DataProblems: rows and files do not fit together, and `skip_bad` is False.
        FileNotFoundError, ValueError: see `list_dataset`.
    """
    listing = list_dataset(path, layout)
    if listing.problems and not skip_bad:
        raise DataProblems(path, listing.problems)
    return listing.records


def check_records(path: str | PathLike[str], layout: str = "auto") -> list[Problem]:
    """Everything that is wrong with a data set, after opening every file; an empty list if nothing is.

    Raises:
        FileNotFoundError, ValueError: see `list_dataset`.
    """
    listing = list_dataset(path, layout)
    return listing.problems + check_listing(listing)[1]


def usable_records(
    path: str | PathLike[str], layout: str = "auto", *, skip_bad: bool = False
) -> tuple[list[Record], list[Problem]]:
    """The pairs that can be trained on, after opening every file, and what was left out.

    Args:
        path: folder of the data set, or a manifest file.
        layout: "lvit", "languide", "manifest", or "auto".
        skip_bad: leave bad pairs out instead of refusing the data set.

    Returns:
        The good records, and the problems of the others (empty unless `skip_bad`).

    Raises:
        DataProblems: something is wrong and `skip_bad` is False; `str()` of it is the table of all problems.
        ValueError: nothing usable is left; or see `list_dataset`.
    """
    listing = list_dataset(path, layout)
    records, found = check_listing(listing)
    problems = listing.problems + found
    if problems and not skip_bad:
        raise DataProblems(path, problems)
    if not records:
        raise ValueError(f"the data set {path} has no usable pair of an image, a mask and a sentence")
    return records, problems
