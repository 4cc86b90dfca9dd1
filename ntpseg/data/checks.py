"""Opening every image and mask of a data set once, to find what would stop or spoil training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ntpseg.data import problems
from ntpseg.data.images import Window, read_oriented
from ntpseg.data.layouts import Listing
from ntpseg.data.masks import MIN_PIXELS, MaskContent, mask_content
from ntpseg.data.patients import patient_notes
from ntpseg.data.problems import Problem
from ntpseg.data.records import MaskOptions, Record
from ntpseg.data.slice_stats import volume_notes
from ntpseg.utils.files import file_identity

Size = tuple[int, int]
Result = TypeVar("Result")

# A mask that covers more of its image than this may be inverted.
MOSTLY_FOREGROUND = 0.5


@dataclass(frozen=True)
class Checked:
    """What `check_listing` found.

    Attributes:
        records: the records without a fault.
        problems: the faults of the others.
        notes: what is worth a look in records that are used.
        negatives: number of `records` without a finding, which `MaskOptions.keep_empty` kept.
        windows: of the images of more than 8 bits, by file.
        empty: the `negatives` themselves.
    """

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    negatives: int = 0
    windows: dict[Path, Window] = field(default_factory=dict)
    empty: list[Record] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Image:
    size: Size
    window: Window | None
    orientation: int


def check_listing(listing: Listing, masks: MaskOptions | None = None) -> Checked:
    """Open the files of a listing's records.

    Args:
        listing: its records are examined; its own problems are not repeated.
        masks: whether cases without a finding are faults.

    Returns:
        The records without a fault, and the faults of the others: unreadable files, an image and a mask
        of different sizes, masks of several classes, empty masks.
    """
    options = masks or MaskOptions()
    images = map_files(_image, (record.image for record in listing.records))
    contents = map_files(mask_content, (record.mask for record in listing.records if record.mask is not None))
    good: list[Record] = []
    faults: list[Problem] = []
    notes: list[Problem] = []
    empty: list[Record] = []
    sizes: dict[str, tuple[Size, Path]] = {}
    for record in listing.records:
        image = images[record.image]
        content = None if record.mask is None else contents[record.mask]
        found = list(_faults(record, image, content, listing, options))
        if not found and isinstance(image, _Image):
            found += _size_fault(record, image.size, sizes, listing)
        faults += found
        if not found and isinstance(image, _Image) and not isinstance(content, str):
            good.append(record)
            notes += _notes(record, image, content, listing)
            if content is not None and content.area(record.mask_value) < MIN_PIXELS:
                empty.append(record)
    notes += [*patient_notes(good), *_ambiguous(good, listing), *volume_notes(good)]
    windows = {path: image.window for path, image in images.items() if isinstance(image, _Image) and image.window}
    return Checked(good, faults, list(dict.fromkeys(notes)), len(empty), windows, empty)


def _size_fault(record: Record, size: Size, sizes: dict[str, tuple[Size, Path]], listing: Listing) -> Iterable[Problem]:
    """Slices of a volume have the size of the first of them."""
    if record.place is None or not record.place.volume:
        return
    first, path = sizes.setdefault(record.place.volume, (size, record.image))
    if first != size:
        detail = f"{size[1]}x{size[0]} pixels, {listing.short(path)} of the same volume {first[1]}x{first[0]}"
        yield Problem(problems.SIZE_MISMATCH, record.split, listing.short(record.image), detail)


def _faults(
    record: Record, image: _Image | str, content: MaskContent | str | None, listing: Listing, options: MaskOptions
) -> Iterable[Problem]:
    if isinstance(image, str):
        yield Problem(problems.UNREADABLE, record.split, listing.short(record.image), image)
    if record.mask is None or content is None:
        return
    name = listing.short(record.mask)
    if isinstance(content, str):
        yield Problem(problems.UNREADABLE, record.split, name, content)
        return
    if not isinstance(image, str) and content.size != image.size:
        height, width = content.size
        detail = f"the mask has {width}x{height} pixels, its image {image.size[1]}x{image.size[0]}"
        yield Problem(problems.SIZE_MISMATCH, record.split, name, detail + _turned(record, image, content))
    try:
        area = content.area(record.mask_value)
    except ValueError as error:
        yield Problem(problems.SEVERAL_CLASSES, record.split, name, str(error))
        return
    if area < MIN_PIXELS and not options.keep_empty:
        detail = "no pixel is foreground"
        if area:
            detail = f"only {area} of its pixels {'is' if area == 1 else 'are'} foreground, fewer than {MIN_PIXELS}"
        elif record.mask_value:
            detail = f"no pixel is {record.mask_value}; there is {', '.join(content.classes) or 'nothing else'}"
        yield Problem(problems.EMPTY_MASK, record.split, name, f"{detail}; keep such cases with data.keep_empty")


def _turned(record: Record, image: _Image, content: MaskContent) -> str:
    if (image.orientation == 1) == (content.orientation == 1):
        return ""
    turned = "image" if image.orientation != 1 else "mask"
    return f"; the EXIF orientation of the {turned} was applied: save both upright"


def _notes(record: Record, image: _Image, content: MaskContent | None, listing: Listing) -> Iterable[Problem]:
    name = listing.short(record.image)
    if image.window is not None and image.window.nonfinite:
        detail = f"{image.window.nonfinite} pixels are NaN or infinite; they are read as black"
        yield Problem(problems.OUTLIERS, record.split, name, detail)
    if image.window is not None and image.window.has_outliers:
        window = image.window
        detail = f"from {window.minimum:g} to {window.maximum:g}; {window} is stretched to 0..255, the rest clipped"
        yield Problem(problems.OUTLIERS, record.split, name, detail)
    if content is None or record.mask is None:
        return
    if image.orientation != content.orientation:
        detail = f"EXIF orientation {image.orientation} was applied, {content.orientation} to its mask: do they fit?"
        yield Problem(problems.ORIENTATION, record.split, name, detail)
    area = content.area(record.mask_value)
    mask = listing.short(record.mask)
    if area > MOSTLY_FOREGROUND * content.size[0] * content.size[1]:
        share = 100 * area / (content.size[0] * content.size[1])
        yield Problem(problems.MOSTLY_FOREGROUND, record.split, mask, f"{share:.0f} % is foreground: is it inverted?")
    if content.note:
        yield Problem(problems.UNUSUAL_MASK, record.split, mask, content.note)
    if area < MIN_PIXELS:
        detail = f"{area} foreground pixels, kept as a case without a finding"
        yield Problem(problems.NEGATIVE, record.split, mask, detail)


def _ambiguous(records: Iterable[Record], listing: Listing) -> Iterable[Problem]:
    """A note for each split in which one image has two masks for one sentence: no model can give both."""
    first: dict[tuple[str, Path, str], Record] = {}
    found: dict[str, dict[tuple[Path, str], tuple[Record, Record]]] = {}
    for record in records:
        text = " ".join(record.text.split()).casefold()
        other = first.setdefault((record.split, record.image, text), record)
        if record.mask != other.mask or record.mask_value != other.mask_value:
            found.setdefault(record.split, {}).setdefault((record.image, text), (other, record))
    for split, pairs in found.items():
        one, two = next(iter(pairs.values()))
        name = listing.short(one.image) + (", ..." if len(pairs) > 1 else "")
        masks = [listing.short(r.mask or "") + (f" ({r.mask_value})" if r.mask_value else "") for r in (one, two)]
        more = f"; {len(pairs)} such sentences in all" if len(pairs) > 1 else ""
        yield Problem(problems.AMBIGUOUS, split, name, f"{one.text!r} is said of {masks[0]} and of {masks[1]}{more}")


def map_files(function: Callable[[Path], Result], paths: Iterable[Path]) -> dict[Path, Result | str]:
    """``function(path)`` of each path, or the reason why it failed; a file under several names is opened once."""
    inodes = {path: file_identity(path) or path for path in dict.fromkeys(paths)}
    first = {inode: path for path, inode in reversed(inodes.items())}

    def guarded(path: Path) -> Result | str:
        try:
            return function(path)
        except (OSError, ValueError, MemoryError) as error:
            return (str(error) or type(error).__name__).replace(str(path), path.name)

    # Decoding releases the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = dict(zip(first, pool.map(guarded, first.values())))
    return {path: results[inodes[path]] for path in inodes}


def _image(path: Path) -> _Image:
    pixels, window, orientation = read_oriented(path)
    return _Image((pixels.shape[0], pixels.shape[1]), window, orientation)
