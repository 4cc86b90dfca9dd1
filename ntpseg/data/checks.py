"""Opening every image and mask of a data set once, to find what would stop or spoil training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ntpseg.data.images import read_image, read_mask
from ntpseg.data.layouts import Listing
from ntpseg.data.problems import EMPTY_MASK, SIZE_MISMATCH, UNREADABLE, Problem
from ntpseg.data.records import Record

Size = tuple[int, int]
Result = TypeVar("Result")


def check_listing(listing: Listing) -> tuple[list[Record], list[Problem]]:
    """Open the files of a listing's records.

    Args:
        listing: its records are examined; its own problems are not repeated.

    Returns:
        The records without a fault, and the faults of the others: unreadable files, an image and a mask
        of different sizes, empty masks.
    """
    images = map_files(_image_size, (record.image for record in listing.records))
    masks = map_files(_mask_size, (record.mask for record in listing.records if record.mask is not None))
    good: list[Record] = []
    problems: list[Problem] = []
    for record in listing.records:
        faults = list(_faults(record, images, masks, listing))
        problems += faults
        if not faults:
            good.append(record)
    return good, problems


def _faults(
    record: Record, images: dict[Path, Size | str], masks: dict[Path, tuple[Size, bool] | str], listing: Listing
) -> Iterable[Problem]:
    image = images[record.image]
    if isinstance(image, str):
        yield Problem(UNREADABLE, record.split, listing.short(record.image), image)
    if record.mask is None:
        return
    mask = masks[record.mask]
    name = listing.short(record.mask)
    if isinstance(mask, str):
        yield Problem(UNREADABLE, record.split, name, mask)
        return
    size, nonempty = mask
    if not isinstance(image, str) and size != image:
        detail = f"the mask has {size[1]}x{size[0]} pixels, its image {image[1]}x{image[0]}"
        yield Problem(SIZE_MISMATCH, record.split, name, detail)
    if not nonempty:
        yield Problem(EMPTY_MASK, record.split, name, "no pixel is foreground")


def map_files(function: Callable[[Path], Result], paths: Iterable[Path]) -> dict[Path, Result | str]:
    """``function(path)`` of each path, or the reason why it failed; a file under several names is opened once."""
    inodes = {path: _inode(path) for path in dict.fromkeys(paths)}
    first = {inode: path for path, inode in reversed(inodes.items())}

    def guarded(path: Path) -> Result | str:
        try:
            return function(path)
        except (OSError, ValueError, MemoryError) as error:
            return str(error.__cause__ or error).replace(str(path), path.name)

    # Decoding releases the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = dict(zip(first, pool.map(guarded, first.values())))
    return {path: results[inodes[path]] for path in inodes}


def _inode(path: Path) -> tuple[int, int] | Path:
    try:
        stat = path.stat()
    except OSError:
        return path
    return (stat.st_dev, stat.st_ino) if stat.st_ino else path


def _image_size(path: Path) -> Size:
    height, width = read_image(path).shape[:2]
    return height, width


def _mask_size(path: Path) -> tuple[Size, bool]:
    mask = read_mask(path)
    return (mask.shape[0], mask.shape[1]), bool(mask.any())
