"""Loading a data set of any supported layout."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from ntpseg.data.checks import Checked, check_listing
from ntpseg.data.layouts import LAYOUT_NAMES, LAYOUTS, Layout, Listing
from ntpseg.data.patients import separate_images, separate_patients
from ntpseg.data.problems import DataProblems, Problem
from ntpseg.data.records import MaskOptions, Record
from ntpseg.data.shards import dataset_url
from ntpseg.utils.checks import check_choice

_SEARCHED = 20  # folders for a hint


def detect_layout(path: Path) -> Layout:
    """Recognise the layout of a data set by its files and folders.

    Raises:
        ValueError: it has none of the known layouts.
    """
    for layout in LAYOUTS.values():
        if layout.matches(path):
            return layout
    known = ", ".join(f"{layout.name} ({layout.describe})" for layout in LAYOUTS.values())
    deeper = "".join(f"; {folder} has one: give that" for folder in _folders_below(path) if _matches(folder))
    raise ValueError(f"path must have one of the known layouts {known}, got {path}{deeper}")


def _matches(path: Path) -> bool:
    return any(layout.matches(path) for layout in LAYOUTS.values())


def _folders_below(path: Path) -> list[Path]:
    """Some folders in `path`, and in those: archives unpack into a folder of their own, and downloads into another."""
    first = _folders(path)[:_SEARCHED]
    return first + [folder for outer in first for folder in _folders(outer)][:_SEARCHED]


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(folder for folder in path.iterdir() if folder.is_dir())
    except OSError:
        return []


def list_dataset(path: str | PathLike[str], layout: str = "auto", masks: MaskOptions | None = None) -> Listing:
    """Read a data set's tables and match them with its files, opening no image.

    Args:
        path: folder of the data set, or a manifest file.
        layout: the name of one of `LAYOUTS`, or "auto".
        masks: which class of label maps is read where the tables do not say it.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: `layout` is unknown, or `path` does not have it.
    """
    root = Path(path).expanduser()
    listing = _layout(root, layout).read(root)
    separate_patients(listing)
    separate_images(listing)
    if masks is not None and masks.mask_value:
        listing.records = [r if r.mask_value else replace(r, mask_value=masks.mask_value) for r in listing.records]
    return listing


def _layout(root: Path, name: str) -> Layout:
    check_choice("layout", name, LAYOUT_NAMES)
    if dataset_url(root) is None and not root.exists():
        raise FileNotFoundError(f"path must be an existing data set, got {root}")
    return detect_layout(root) if name == "auto" else LAYOUTS[name]


def load_records(
    path: str | PathLike[str], layout: str = "auto", *, skip_bad: bool = False, masks: MaskOptions | None = None
) -> list[Record]:
    """The pairs of a data set, in the order of its tables: train, val, test.

    Only tables and folders are read here; `usable_records` opens every file as well.

    Args:
        path: folder of the data set, or a manifest file.
        layout: the name of one of `LAYOUTS`, or "auto".
        skip_bad: leave bad rows out instead of refusing the data set.
        masks: how masks are read, see `MaskOptions`.

    Raises:
        DataProblems: rows and files do not fit together, and `skip_bad` is False.
        FileNotFoundError, ValueError: see `list_dataset`.
    """
    listing = list_dataset(path, layout, masks)
    if listing.problems and not skip_bad:
        raise DataProblems(path, listing.problems)
    return listing.records


def check_records(
    path: str | PathLike[str], layout: str = "auto", *, masks: MaskOptions | None = None
) -> list[Problem]:
    """Everything that is wrong with a data set, after opening every file; an empty list if nothing is.

    Raises:
        FileNotFoundError, ValueError: see `list_dataset`.
    """
    return inspect_dataset(path, layout, masks=masks).problems


def inspect_dataset(path: str | PathLike[str], layout: str = "auto", *, masks: MaskOptions | None = None) -> Checked:
    """Open every file of a data set: what can be used, what is wrong, and what is worth a look.

    Raises:
        FileNotFoundError, ValueError: see `list_dataset`; a file of a packed set is not what was packed.
    """
    root = Path(path).expanduser()
    if verify := _layout(root, layout).verify:
        verify(root)
    listing = list_dataset(path, layout, masks)
    checked = check_listing(listing, masks)
    return replace(checked, problems=listing.problems + checked.problems)


def usable_records(
    path: str | PathLike[str], layout: str = "auto", *, skip_bad: bool = False, masks: MaskOptions | None = None
) -> tuple[list[Record], list[Problem]]:
    """The pairs that can be trained on, after opening every file, and what was left out.

    Args:
        path: folder of the data set, or a manifest file.
        layout: the name of one of `LAYOUTS`, or "auto".
        skip_bad: leave bad pairs out instead of refusing the data set.
        masks: how masks are read, and whether cases without a finding are kept.

    Returns:
        The good records, and the problems of the others (empty unless `skip_bad`).

    Raises:
        DataProblems: something is wrong and `skip_bad` is False; `str()` of it is the table of all problems.
        ValueError: nothing usable is left; or see `list_dataset`.
    """
    checked = inspect_dataset(path, layout, masks=masks)
    require_usable(checked, path, skip_bad=skip_bad)
    return checked.records, checked.problems


def require_usable(checked: Checked, path: str | PathLike[str], *, skip_bad: bool = False) -> None:
    """Raise what `usable_records` raises."""
    if checked.problems and not skip_bad:
        raise DataProblems(path, checked.problems)
    if not checked.records:
        raise ValueError(
            f"path must hold at least one usable pair of an image, a mask and a sentence, got none in {path}"
        )
