"""Boxes around what a sentence or a class refers to: a CSV or Excel file with a row for each box, or COCO JSON.

::

    SRC/boxes.csv       the only table of SRC, or the table itself as SRC
    SRC/images/...      or beside the table; names in the column image, with or without extension

Columns: image; a sentence (text, caption, phrase, ...) or a class (class, category, ...: sentences by templates); the
box as x, y, w, h (or width, height) or as xmin, ymin, xmax, ymax (or x1 ...), in pixels, x to the right and y down from
the upper left corner; if wanted image_width and image_height, split and subject. All boxes of one sentence (or class)
in an image are one mask. Where the stated size is not the image's, the image was resized: boxes are scaled. A row
without numbers is an image without a finding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.data.layouts.annotations import SplitFiles, name_of, read_json
from ntpseg.data.layouts.manifest import SPLIT_NAMES
from ntpseg.data.records import known_suffix, subject_of
from ntpseg.data.tables import Row, Table, is_sentence, read_table
from ntpseg.importers.base import Case, Sample, Structure
from ntpseg.importers.coco import check_distinct_ids
from ntpseg.importers.loading import LayerPacker
from ntpseg.importers.options import ImportOptions

COLUMNS = {
    "image": ("image", "image_path", "path", "file_name", "filename", "img", "image_name", "image_id", "dicom_id"),
    "text": ("text", "label_text", "sentence", "caption", "phrase", "description", "prompt"),
    "category": ("category_name", "category", "class", "class_name", "finding", "label"),
    "split": ("split", "set", "fold"),
    "subject": ("subject", "subject_id", "patient", "patient_id"),
    "modality": ("modality",),
    "image_width": ("image_width", "img_width"),
    "image_height": ("image_height", "img_height"),
}
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"), ("x1", "y1", "x2", "y2"))
_SIZES = (("x", "y", "w", "h"), ("x", "y", "width", "height"))
TABLES = (".csv", ".tsv", ".xlsx", ".json")
# Of the ratio of the sides: what rounding changes when an image is resized, but neither a crop nor a border.
_ASPECT = 0.02


@dataclass(frozen=True, slots=True)
class Box:
    """One row.

    Attributes:
        where: for messages, such as "boxes.csv row 3".
        image: name of the image as the source writes it.
        text: the sentence; "" where there is only a class.
        category: the class; "" where there is none.
        corners: x0, y0, x1, y1 in pixels of an image of `size`; None: the image has no finding.
        size: stated width and height of the image; None where not stated.
        split, subject, modality: "" where not stated.
        fault: why the row cannot be used; "" where it can.
    """

    where: str
    image: str
    text: str = ""
    category: str = ""
    corners: tuple[float, float, float, float] | None = None
    size: tuple[float, float] | None = None
    split: str = ""
    subject: str = ""
    modality: str = ""
    fault: str = ""


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the images of a table of boxes.

    Raises:
        ValueError: there is no table, or it lacks a column; or rows are malformed and `options.skip_bad` is False.
    """
    table = find_table(source)
    places = [SplitFiles(table.parent / name) for name in ("images", "imgs", "img", "")]
    return cases_of(read_boxes(table, options), functools.partial(_find, places), _subject)


def find_table(source: Path, patterns: Sequence[str] = ("*",)) -> Path:
    """The table that `source` is, or the only one in it that matches the first of `patterns` with any.

    Raises:
        ValueError: there is none, or there are several.
    """
    if source.is_file():
        return source
    for pattern in patterns:
        found = sorted(path for path in source.glob(pattern) if path.suffix.lower() in TABLES and path.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:4])
            raise ValueError(f"source must hold one table of boxes, got {names} in {source}; give one of these as SRC")
        if found:
            return found[0]
    raise ValueError(f"source must be a table of boxes (CSV, xlsx, COCO JSON) or a folder with one, got {source}")


def read_boxes(path: Path, options: ImportOptions) -> list[Box]:
    """The rows of a table or the annotations of a COCO file.

    Raises:
        ValueError: see `read`.
    """
    boxes = _coco_boxes(path) if path.suffix.lower() == ".json" else _table_boxes(read_table(path), options)
    if not boxes:
        raise ValueError(f"{path} must hold at least one box, got none")
    return boxes


def cases_of(
    boxes: Sequence[Box], find: Callable[[str], Path | None], subject: Callable[[str], str], modality: str = ""
) -> list[Case]:
    """One case for each image, with a structure for each sentence, or for each class that has no sentence.

    Args:
        boxes: in the table's order.
        find: the file of an image's name; None where there is none.
        subject: whose image a name stands for, where the row does not say.
        modality: of all images that state none.
    """
    by_image: dict[str, list[Box]] = {}
    for box in boxes:
        by_image.setdefault(box.image, []).append(box)
    # Every class is one that an image may show, and be asked for in vain; a sentence belongs to its own image.
    classes = {box.category: Structure(box.category, ()) for box in boxes if box.category and not box.text}
    cases = []
    for name, own in by_image.items():
        case = _case_name(name)
        stated = {box.split for box in own if box.split}
        load = functools.partial(_load, case, name, tuple(own), find, classes, modality)
        whose = next((box.subject for box in own if box.subject), "") or subject(name)
        cases.append(Case(case, whose, load, stated.pop() if len(stated) == 1 else ""))
        if stated:
            raise ValueError(f"image {name} must be in one split, got several ({own[0].where} and others)")
    return cases


def _load(
    case: str,
    name: str,
    boxes: tuple[Box, ...],
    find: Callable[[str], Path | None],
    classes: Mapping[str, Structure],
    modality: str,
) -> Sample:
    from ntpseg.data.images import read_image

    if fault := next((f"{box.where} {box.fault}" for box in boxes if box.fault), ""):
        raise ValueError(fault)
    path = find(name)
    if path is None:
        raise ValueError(f"{boxes[0].where} must name an image that is there, got {name}; copy or link the file")
    pixels = read_image(path)
    masks: dict[tuple[str, str], np.ndarray] = {}
    for box in boxes:
        if box.corners is not None:
            key = ("", " ".join(box.text.split())) if box.text else (box.category, "")
            mask = box_mask(box, path, pixels.shape[:2])
            masks[key] = masks[key] | mask if key in masks else mask
    packer = LayerPacker(pixels.shape[:2])
    structures = dict(classes)
    named = {" ".join(box.text.split()): box.category for box in boxes if box.text}
    taken = set(classes)
    for (category, text), mask in masks.items():
        parts = (packer.add(mask),)
        if not text:
            structures[category] = Structure(category, parts)
            continue
        own = named[text] or "finding"
        number = next(n for n in range(1, len(boxes) + len(taken) + 2) if _numbered(own, n) not in taken)
        taken.add(_numbered(own, number))
        structures[_numbered(own, number)] = Structure(_numbered(own, number), parts, (text,))
    stated = next((box.modality for box in boxes if box.modality), "") or modality
    return Sample(pixels, tuple(packer.layers), tuple(structures.values()), stated)


def box_mask(box: Box, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """bool [H, W] of one box in an image of `shape`, scaled where the image was resized; cut at the image's edges.

    Raises:
        ValueError: the image has another aspect ratio than stated, or the box lies outside.
    """
    assert box.corners is not None
    height, width = shape
    stated_width, stated_height = box.size or (width, height)
    across, down = width / stated_width, height / stated_height
    if abs(across / down - 1) > _ASPECT + 1 / min(width, height):
        raise ValueError(
            f"{path} must have the aspect ratio of the size that {box.where} states, "
            f"{stated_width:g}x{stated_height:g}, got {width}x{height}: was it cropped or padded?"
        )
    x0, y0, x1, y1 = box.corners
    left, right = _range(x0 * across, x1 * across, width)
    top, bottom = _range(y0 * down, y1 * down, height)
    if left >= right or top >= bottom:
        raise ValueError(
            f"{box.where} must have a box inside the image of {stated_width:g}x{stated_height:g}, "
            f"got {x0:g}, {y0:g} to {x1:g}, {y1:g}"
        )
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def _range(low: float, high: float, size: int) -> tuple[int, int]:
    """The pixels whose centres lie between two edges, at least one; cut at 0 and `size`."""
    start, stop = math.ceil(low - 0.5), math.ceil(high - 0.5)
    stop = max(stop, start + 1)
    return max(start, 0), min(stop, size)


def _table_boxes(table: Table, options: ImportOptions) -> list[Box]:
    names = {key: next((n for n in aliases if n in table.columns), None) for key, aliases in COLUMNS.items()}
    shape = next((names for names in (*_CORNERS, *_SIZES) if all(name in table.columns for name in names)), None)
    if shape is None:
        table.require(_SIZES[0])
        raise AssertionError("the columns are there")
    if names["text"] is None and names["category"] is None:
        table.require(["text"])
    table.require([names["image"] or "image", *shape])
    if shape in _CORNERS and names["image_width"] is None and {"width", "height"} <= set(table.columns):
        # As in Pascal VOC: filename, width, height, class, xmin, ...
        names |= {"image_width": "width", "image_height": "height"}
    if not options.skip_bad:
        table.refuse_faults()
    return [_row_box(table.path.name, row, names, shape) for row in table.rows]


def _row_box(file: str, row: Row, names: Mapping[str, str | None], shape: tuple[str, ...]) -> Box:
    cells = {key: row.get(name, "") if name is not None else "" for key, name in names.items()}
    where = f"{file} row {row.number}"
    faults = []
    if not cells["image"]:
        faults.append("must name an image, got an empty cell")
    if not is_sentence(cells["text"]) and not cells["category"]:
        faults.append(f"must have a sentence or a class, got {cells['text']!r}")
    corners, fault = _corners([row[name] for name in shape], shape in _CORNERS)
    faults.append(fault)
    size, fault = _size(cells["image_width"], cells["image_height"])
    faults.append(fault)
    split = _split(cells["split"])
    if cells["split"] and not split:
        faults.append(f"must have the split train, val or test, got {cells['split']!r}")
    text = cells["text"] if is_sentence(cells["text"]) else ""
    fault = next((fault for fault in faults if fault), "")
    return Box(
        where, cells["image"], text, cells["category"], corners, size, split, cells["subject"], cells["modality"], fault
    )


def _coco_boxes(path: Path) -> list[Box]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} must be a COCO JSON file, got {error}") from error
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(value, list) and all(isinstance(item, dict) for item in value) for value in lists):
        raise ValueError(f"{path} must be COCO's, with lists of images, annotations and categories, got something else")
    images, annotations, categories = ([item for item in value or []] for value in lists)
    check_distinct_ids(path, "images", [image.get("id") for image in images])
    check_distinct_ids(path, "categories", [category.get("id") for category in categories])
    by_id = {str(image.get("id")): image for image in images}
    names = {str(category.get("id")): name_of(category.get("name")) for category in categories}
    boxes = []
    for annotation in annotations:
        image = by_id.get(str(annotation.get("image_id")), {})
        bbox = annotation.get("bbox")
        cells = [str(number) for number in bbox] if isinstance(bbox, list) and len(bbox) == 4 else ["?"] * 4
        corners, fault = _corners(cells, False)
        # MS-CXR states the size in both.
        width, height = (str(image.get(key) or annotation.get(key) or "") for key in ("width", "height"))
        size, wrong = _size(width, height)
        row: dict[str, Any] = {**image, **annotation}
        text = next((found for name in COLUMNS["text"] if (found := name_of(row.get(name)))), "")
        category = names.get(str(annotation.get("category_id")), "")
        split = _split(str(row.get("split") or ""))
        where = f"{path.name} annotation {annotation.get('id', '?')}"
        if not is_sentence(text) and not category:
            wrong = "must have a sentence or a category, got neither"
        name = name_of(image.get("path")) or name_of(image.get("file_name"))
        fault = ("" if name else "must name an image of the list, got none") or fault or wrong
        subject = next((str(row[key]) for key in COLUMNS["subject"] if row.get(key)), "")
        boxes.append(Box(where, name, text, category, corners, size, split, subject, fault=fault))
    return boxes


def _corners(cells: Sequence[str], corners: bool) -> tuple[tuple[float, float, float, float] | None, str]:
    """x0, y0, x1, y1 of four cells, and what is wrong with them; None for empty cells."""
    if not any(cells):
        return None, ""
    numbers = [_number(cell) for cell in cells]
    if not all(math.isfinite(number) for number in numbers):
        return None, f"must have four numbers of its box, got {', '.join(cells)}"
    x, y, right, below = numbers
    if not corners:
        right, below = x + right, y + below
    if right <= x or below <= y or not math.isfinite(right - x + below - y):
        return None, f"must have a box with an area, got {', '.join(cells)}"
    return (x, y, right, below), ""


def _size(width: str, height: str) -> tuple[tuple[float, float] | None, str]:
    if not width and not height:
        return None, ""
    numbers = _number(width), _number(height)
    if not all(math.isfinite(number) and number >= 1 for number in numbers):
        return None, f"must state the image's size in pixels, got {width!r} x {height!r}"
    return numbers, ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _split(text: str) -> str:
    # "validate" is MIMIC-CXR's word.
    return (SPLIT_NAMES | {"validate": "val"}).get(text.strip().lower(), "")


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} {number}"


def _case_name(image: str) -> str:
    name = image.replace("\\", "/").rsplit("/", 1)[-1]
    return name.removesuffix(known_suffix(name)) or "image"


def _subject(image: str) -> str:
    return subject_of(_case_name(image))


def _find(places: Sequence[SplitFiles], name: str) -> Path | None:
    return next((found for place in places if (found := place.find(name)) is not None), None)
