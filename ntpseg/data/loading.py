"""Loading a data set of any supported layout."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from ntpseg.data.checks import check_listing
from ntpseg.data.layouts import LAYOUT_NAMES, LAYOUTS, Layout, Listing
from ntpseg.data.problems import DataProblems, Problem
from ntpseg.data.records import Record
from ntpseg.utils.checks import check_choice


def detect_layout(path: Path) -> Layout:
    """Recognise the layout of a data set by its files and folders.

    Raises:
        ValueError: it has none of the known layouts.
    """
    for layout in LAYOUTS.values():
        if layout.matches(path):
            return layout
    known = ", ".join(f"{layout.name} ({layout.describe})" for layout in LAYOUTS.values())
    raise ValueError(f"path must have one of the known layouts {known}, got {path}")


def list_dataset(path: str | PathLike[str], layout: str = "auto") -> Listing:
    """Read a data set's tables and match them with its files, opening no image.

    Args:
        path: folder of the data set, or a manifest file.
        layout: the name of one of `LAYOUTS`, or "auto".

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: `layout` is unknown, or `path` does not have it.
    """
    root = Path(path).expanduser()
    check_choice("layout", layout, LAYOUT_NAMES)
    if not root.exists():
        raise FileNotFoundError(f"path must be an existing data set, got {root}")
    return (detect_layout(root) if layout == "auto" else LAYOUTS[layout]).read(root)


def load_records(path: str | PathLike[str], layout: str = "auto", *, skip_bad: bool = False) -> list[Record]:
    """The pairs of a data set, in the order of its tables: train, val, test.

    Only tables and folders are read here; `usable_records` opens every file as well.

    Args:
        path: folder of the data set, or a manifest file.
        layout: the name of one of `LAYOUTS`, or "auto".
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
        layout: the name of one of `LAYOUTS`, or "auto".
        skip_bad: leave bad pairs out instead of refusing the data set.

    Returns:
        The good records, and the problems of the others (empty unless `skip_bad`).

    Raises:
        DataProblems: something is wrong and `skip_bad` is False; `str()` of it is the table of all problems.
        ValueError: nothing usable is left; or see `list_dataset`.
    """
    listing = list_dataset(path, layout)
    records, file_problems = check_listing(listing)
    problems = listing.problems + file_problems
    if problems and not skip_bad:
        raise DataProblems(path, problems)
    if not records:
        raise ValueError(
            f"path must hold at least one usable pair of an image, a mask and a sentence, got none in {path}"
        )
    return records, problems
