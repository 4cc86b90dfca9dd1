"""Loading a data set of any supported layout."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from ntpseg.data.listing import Listing
from ntpseg.data.lvit import is_lvit, list_lvit
from ntpseg.data.problems import DataProblems
from ntpseg.data.records import Record

LAYOUTS = ("auto", "lvit")


def list_dataset(path: str | PathLike[str], layout: str = "auto") -> Listing:
    """Read a data set's tables and match them with its files, opening no image.

    Args:
        path: folder of the data set.
        layout: one of `LAYOUTS`; "auto" tells them apart by their folders.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: `layout` is unknown, or "auto" recognises none.
    """
    root = Path(path).expanduser()
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if not root.exists():
        raise FileNotFoundError(f"the data set {root} does not exist")
    if layout == "lvit" or is_lvit(root):
        return list_lvit(root)
    raise ValueError(f"path is {root}, which has none of the known layouts ({', '.join(LAYOUTS[1:])})")


def load_records(path: str | PathLike[str], layout: str = "auto", *, skip_bad: bool = False) -> list[Record]:
    """The pairs of a data set, in the order of its tables: train, val, test.

    Only tables and folders are read here; `ntpseg.data.usable_records` opens every file as well.

    Args:
        path: folder of the data set.
        layout: "lvit" or "auto".
        skip_bad: leave bad rows out instead of refusing the data set.

    Raises:
        DataProblems: rows and files do not fit together, and `skip_bad` is False.
        FileNotFoundError, ValueError: see `list_dataset`.
    """
    listing = list_dataset(path, layout)
    if listing.problems and not skip_bad:
        raise DataProblems(path, listing.problems)
    return listing.records
