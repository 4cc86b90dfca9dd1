"""COCO JSON: polygons, RLE and uncompressed RLE, of categories; captions of instances and referring expressions.

The instances of a category in an image are one structure; an annotation with sentences of its own ("caption",
"captions", "sentences", "text") is one by itself, and its sentences are kept. Images lie in the folder ``images``
beside the JSON file, in a folder of the JSON file's name, or beside it.

SRC is a JSON file, or a folder with one for each split ("train", "val" or "test" in its name) or with one for all.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.data.records import subject_of
from ntpseg.importers.base import Case, Sample, Structure
from ntpseg.importers.loading import LayerPacker, case_of_file
from ntpseg.importers.options import ImportOptions
from ntpseg.importers.templates import read_mapping
from ntpseg.utils.checks import brief

_SENTENCES = ("captions", "caption", "sentences", "sentence", "text", "expression")
_SPLITS = ((r"train", "train"), (r"val", "val"), (r"test", "test"))
# Of the image's longer side: how far a polygon may reach.
_OUTSIDE = 100
_FOLDERS = ("images", "imgs", "img", "")


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the images of one or several COCO files.

    Raises:
        ValueError: pycocotools is missing, a file is not COCO's, or an image that it lists is not there.
    """
    from ntpseg.volumes.extras import require

    require("pycocotools.mask", "coco", "COCO masks")
    files = [source] if source.is_file() else sorted(p for p in (*source.glob("*.json"), *source.glob("*/*.json")))
    if not files:
        raise ValueError(f"source must be a COCO JSON file or a folder with one, got {source} with none")
    cases: list[Case] = []
    for path in files:
        cases += _read_file(path, _split_of(path) if len(files) > 1 else "")
    return cases


def _read_file(path: Path, split: str) -> list[Case]:
    content = read_mapping(path, "source")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"{path} must be COCO's, with the lists images, annotations and categories, got no {key}")
    check_distinct_ids(path, "categories", [category.get("id") for category in _objects(path, content, "categories")])
    check_distinct_ids(path, "images", [image.get("id") for image in _objects(path, content, "images")])
    try:
        names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
        by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if int(annotation["category_id"]) not in names:
                raise KeyError(annotation["category_id"])
            by_image[annotation["image_id"]].append(annotation)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must give ids of images and categories that it lists, got none such as {error}"
        ) from error
    categories = tuple(Structure(name, ()) for name in names.values())
    if len({category.name for category in categories}) < len(categories):
        raise ValueError(f"{path} must have categories with names of their own, got one twice")
    cases = []
    files: set[Path] = set()
    for image in content["images"]:
        file = _find(path, str(image.get("file_name", "")))
        # Every entry has annotations of its own: of a second one the first would be an image without its findings.
        if file.resolve() in files:
            raise ValueError(
                f"{path} must list every image once, got {image['file_name']} in two entries; put its annotations "
                "under one id"
            )
        files.add(file.resolve())
        name = case_of_file(Path(str(image["file_name"]).replace("\\", "/")))
        load = functools.partial(_load, name, file, image, by_image[image["id"]], names)
        own = any(_own_sentences(annotation) for annotation in by_image[image["id"]])
        subject = str(image.get("patient_id") or image.get("subject") or subject_of(name))
        cases.append(Case(name, subject, load, split, () if own else categories))
    return cases


def _objects(path: Path, content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    for item in content[key]:
        if not isinstance(item, dict):
            raise ValueError(f"{key} of {path} must be a list of objects, got {brief(item)}")
    return content[key]


def check_distinct_ids(path: Path, what: str, ids: Iterable[Any]) -> None:
    """Raise a `ValueError` if an id is there twice, so that nobody can say which entry an annotation means."""
    seen: set[str] = set()
    for one in map(str, ids):
        if one in seen:
            raise ValueError(
                f"{what} of {path} must have ids of their own, got the id {one} twice; give one another id"
            )
        seen.add(one)


def _load(
    name: str, file: Path, image: dict[str, Any], annotations: Sequence[dict[str, Any]], names: dict[int, str]
) -> Sample:
    from ntpseg.data.images import read_image

    pixels = read_image(file)
    shape = (pixels.shape[0], pixels.shape[1])
    if (image.get("height", shape[0]), image.get("width", shape[1])) != shape:
        raise ValueError(
            f"{file} must have the size that COCO's list states, {image['width']}x{image['height']}, "
            f"got {shape[1]}x{shape[0]}"
        )
    masks: dict[str, np.ndarray] = {}
    structures: list[Structure] = []
    packer = LayerPacker(shape)
    for number, annotation in enumerate(annotations, start=1):
        mask = annotation_mask(name, annotation, shape)
        category = names[int(annotation["category_id"])]
        if sentences := _own_sentences(annotation):
            own = f"{category} {number}"
            structures.append(Structure(own, (packer.add(mask),) if mask.any() else (), sentences))
        elif category in masks:
            masks[category] |= mask
        else:
            masks[category] = mask
    for category in names.values():
        parts = (packer.add(masks[category]),) if category in masks and masks[category].any() else ()
        if parts or not any(structure.name.startswith(f"{category} ") for structure in structures):
            structures.append(Structure(category, parts))
    return Sample(pixels, tuple(packer.layers), tuple(structures))


def annotation_mask(name: str, annotation: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """bool [H, W] of one annotation: polygons ``[[x, y, x, y, ...], ...]``, RLE as text or as counts.

    Raises:
        ValueError: the segmentation is none of these, or of another size; the message names the image.
    """
    height, width = shape
    segmentation = annotation.get("segmentation")
    try:
        if isinstance(segmentation, dict):
            if list(segmentation["size"]) != [height, width]:
                raise ValueError(f"RLE of size {segmentation['size']} for an image of {[height, width]}")
            return _run_mask(segmentation["counts"], height, width)
        if segmentation:
            return _polygon_mask(segmentation, height, width)
        raise ValueError("a box alone is no mask" if annotation.get("bbox") else "nothing is marked")
    except Exception as error:  # pycocotools raises whatever Cython meets
        raise ValueError(
            f"segmentation of annotation {annotation.get('id', '?')} of {name} must be polygons or RLE, "
            f"got {brief(segmentation)} ({' '.join(str(error).split())})"
        ) from error


def _run_mask(counts: Any, height: int, width: int) -> np.ndarray:
    # Not pycocotools.decode: runs that end early leave it memory that nobody wrote.
    runs = _run_lengths(counts) if isinstance(counts, str) else counts
    if not all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in runs):
        raise ValueError("counts that are no whole numbers from 0 on")
    if sum(runs) != height * width:
        raise ValueError(f"counts of {sum(runs)} pixels in all for the {height * width} of the image")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _run_lengths(text: str) -> list[int]:
    """The runs of COCO's compressed RLE: 5 bits a letter from "0" on, runs from the fourth on less the last but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{letter!r} in its counts, which compressed RLE does not have")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("counts that end within a number")
    return runs


def _polygon_mask(polygons: Any, height: int, width: int) -> np.ndarray:
    from pycocotools import mask as coco

    for polygon in polygons:
        # pycocotools takes four numbers for a box, and leaves out the last of an odd number.
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon must be three or more pairs x, y in one list")
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in polygon):
            raise ValueError("a polygon of what are no numbers")
        # pycocotools holds every point of an outline, inside of the image or not.
        if max(map(abs, polygon)) > _OUTSIDE * max(height, width):
            raise ValueError("a polygon far outside of the image")
    return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)


def _own_sentences(annotation: dict[str, Any]) -> tuple[str, ...]:
    for key in _SENTENCES:
        value = annotation.get(key)
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        # RefCOCO: {"raw": "the left one", "tokens": [...]}
        sentences = [text.get("raw", "") if isinstance(text, dict) else text for text in texts]
        if found := tuple(dict.fromkeys(text.strip() for text in sentences if isinstance(text, str) and text.strip())):
            return found
    return ()


def _split_of(path: Path) -> str:
    words = f"{path.parent.name} {path.stem}".lower()
    return next((split for pattern, split in _SPLITS if re.search(rf"(?<![a-z]){pattern}", words)), "")


def _find(path: Path, name: str) -> Path:
    relative = Path(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or not name:
        raise ValueError(f"{path} must name images below its folder, got {name!r}")
    roots = [path.parent / path.stem, path.parent, path.parent.parent]
    for root in roots:
        for folder in _FOLDERS:
            if (root / folder / relative).is_file():
                return root / folder / relative
    raise ValueError(f"{path} must list images that are there, got {name}; put them into a folder images beside it")
