"""MedVLSM's layout: ``anns/{train,val,test}.json`` beside ``images/`` and ``masks/``.

After https://github.com/naamiinepal/medvlsm (its ``DATASETS.MD`` and annotation files), which prepares Kvasir-SEG,
ClinicDB, BKAI, ISIC, DFU, CAMUS, BUSI and CheXlocalize in this way. A JSON file is a list of objects with
``img_name``, ``mask_name`` (may have a folder in front) and ``prompts``: an object of texts or lists of texts, of which
"p0" is empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ntpseg.data import problems
from ntpseg.data.layouts.annotations import SPLIT_NAMES, Pairs, SplitFiles, name_of, read_json, texts_of
from ntpseg.data.layouts.base import Layout, Listing
from ntpseg.data.layouts.folders import IMAGE_FOLDERS, MASK_FOLDERS, find_subfolder
from ntpseg.data.layouts.manifest import NAMES
from ntpseg.data.records import case_of, subject_of

ANNOTATIONS = ("anns", "annotations", "ann")


def matches_medvlsm(root: Path) -> bool:
    """Whether `root` has ``anns/train.json`` (or val, test) beside images and masks, and no manifest."""
    found = root.is_dir() and bool(_tables(root)) and not any((root / name).is_file() for name in NAMES)
    return found and all(find_subfolder(root, names) is not None for names in (IMAGE_FOLDERS, MASK_FOLDERS))


def read_medvlsm(root: Path) -> Listing:
    """List a data set in MedVLSM's layout; opens its JSON files, but no image.

    Every distinct prompt of an object is a pair of its own.

    Args:
        root: the folder that holds ``anns``.

    Raises:
        ValueError: it holds no ``anns/train.json``, val or test.
    """
    tables = _tables(root)
    if not tables:
        raise ValueError(f"path must hold anns/train.json, val or test in MedVLSM's layout, got {root}")
    listing = Listing(root)
    images = SplitFiles(find_subfolder(root, IMAGE_FOLDERS) or root / "images")
    masks = SplitFiles(find_subfolder(root, MASK_FOLDERS) or root / "masks")
    for split, path in tables.items():
        pairs = Pairs(split, images, masks, listing)
        try:
            content = read_json(path)
            if not isinstance(content, list):
                raise ValueError(
                    "no list; MedVLSM's JSON files are lists of objects with img_name, mask_name and prompts"
                )
        except ValueError as error:
            listing.report(problems.UNREADABLE, split, path, f"it must be a JSON file of annotations, got {error}")
            continue
        for place, entry in pairs.entries(path.name, content):
            image, mask = name_of(entry.get("img_name")), name_of(entry.get("mask_name"))
            where = f"{path.name} entry {place} {mask or image}"
            pairs.add(where, image, mask, _prompts(entry), _subject(image))
        pairs.finish()
    return listing


def _tables(root: Path) -> dict[str, Path]:
    folder = find_subfolder(root, ANNOTATIONS)
    if folder is None:
        return {}
    paths = {split: [folder / f"{name}.json" for name in names] for split, names in SPLIT_NAMES.items()}
    return {split: found[0] for split, tried in paths.items() if (found := [path for path in tried if path.is_file()])}


def _prompts(entry: dict[str, Any]) -> list[str]:
    prompts = entry.get("prompts")
    return texts_of(list(prompts.values()) if isinstance(prompts, dict) else prompts)


def _subject(image: str) -> str:
    return subject_of(case_of(image.replace("\\", "/").rsplit("/", 1)[-1]))


MEDVLSM = Layout("medvlsm", matches_medvlsm, read_medvlsm, "anns/train.json")
