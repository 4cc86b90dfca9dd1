"""Opening every image and mask of a data set once, to find what would stop or spoil training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ntpseg.data import problems
from ntpseg.data.images import read_image, read_mask
from ntpseg.data.listing import Listing
from ntpseg.data.problems import Problem
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
    images = examine_files((record.image for record in listing.records), _image_size)
    masks = examine_files((record.mask for record in listing.records if record.mask is not None), _mask_size)
    good: list[Record] = []
    found: list[Problem] = []
    for record in listing.records:
        faults = list(_faults(record, images, masks, listing))
        found += faults
        if not faults:
            good.append(record)
    return good, found


def _faults(
    record: Record, images: dict[Path, Size | str], masks: dict[Path, tuple[Size, bool] | str], listing: Listing
) -> Iterable[Problem]:
    image = images[record.image]
    if isinstance(image, str):
        yield Problem(problems.UNREADABLE, record.split, listing.short(record.image), image)
    if record.mask is None:
        return
    mask = masks[record.mask]
    name = listing.short(record.mask)
    if isinstance(mask, str):
        yield Problem(problems.UNREADABLE, record.split, name, mask)
        return
    size, full = mask
    if not isinstance(image, str) and size != image:
        detail = f"the mask has {size[1]}x{size[0]} pixels, its image {image[1]}x{image[0]}"
        yield Problem(problems.SIZE_MISMATCH, record.split, name, detail)
    if not full:
        yield Problem(problems.EMPTY_MASK, record.split, name, "no pixel is foreground")


def examine_files(paths: Iterable[Path], examine: Callable[[Path], Result]) -> dict[Path, Result | str]:
    """The result for each path, or what went wrong; a file under several names is opened once."""
    wanted = list(dict.fromkeys(paths))
    inodes = {path: _inode(path) for path in wanted}
    first = {inode: path for path, inode in reversed(inodes.items())}

    def examine_or_tell(path: Path) -> Result | str:
        try:
            return examine(path)
        except (OSError, ValueError, MemoryError) as error:
            return str(error.__cause__ or error).replace(str(path), path.name)

    # Decoding releases the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = dict(zip(first, pool.map(examine_or_tell, first.values())))
    return {path: results[inodes[path]] for path in wanted}


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
