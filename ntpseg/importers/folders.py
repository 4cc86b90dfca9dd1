"""A folder of images and a folder of label maps, and a file with the labels' names (``--names``).

::

    SRC/images/CASE.nii.gz      or a folder of DICOM slices, PNG, ...; other names of the folders are listed below
    SRC/labels/CASE.nii.gz
    SRC/{train,val,test}/images, SRC/{train,val,test}/labels    where the source is split

Image and label map belong together by their names, without what is usually in front of or behind them ("_0000",
"_seg", "mask_", ...).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from ntpseg.data.records import subject_of
from ntpseg.importers.base import Case
from ntpseg.importers.loading import ENDINGS, case_of_file, load_pair
from ntpseg.importers.names import read_names
from ntpseg.importers.options import ImportOptions

IMAGES = ("images", "imagestr", "image", "imgs", "img", "volumes", "ct", "mr", "scans")
LABELS = ("labels", "labelstr", "label", "masks", "mask", "segmentations", "segmentation", "seg", "annotations", "gt")
_NAME_FILES = ("labels.json", "names.json", "names.yaml", "names.csv", "labels.csv", "labels.txt", "structures.csv")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_AROUND = re.compile(
    r"^(mask|label|seg|image|img)[_-]|[_-](0000|seg|segmentation|mask|masks|label|labels|gt|image|img|ct)$", re.I
)


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the pairs of `source`.

    Raises:
        ValueError: the folders or the file of names are missing, or an image or a label map is alone.
    """
    if not source.is_dir():
        raise ValueError(f"source must be a folder with the folders images and labels, got the file {source}")
    names = read_names(options.names or _name_file(source))
    cases = []
    for split, images, labels in _pairs_of_folders(source):
        pictures, maps = _by_case(images), _by_case(labels)
        for lonely, where in ((pictures.keys() - maps.keys(), labels), (maps.keys() - pictures.keys(), images)):
            if lonely:
                listed = ", ".join(sorted(lonely)[:3]) + (f", ... ({len(lonely)})" if len(lonely) > 3 else "")
                raise ValueError(f"{where} must have a file for every case, got none for {listed}")
        for case, path in pictures.items():
            load = functools.partial(
                load_pair,
                case,
                [path],
                maps[case],
                names.structures,
                ignored=names.ignored,
                resample=options.resample,
            )
            cases.append(Case(case, subject_of(case), load, split, names.structures))
    return cases


def _pairs_of_folders(source: Path) -> Iterator[tuple[str, Path, Path]]:
    found = False
    splits = [(_SPLITS[path.name.lower()], path) for path in _folders(source) if path.name.lower() in _SPLITS]
    for split, folder in [("", source), *splits]:
        images, labels = _named(folder, IMAGES), _named(folder, LABELS)
        if images and labels:
            found = True
            yield split, images, labels
    if not found:
        names = ", ".join(path.name for path in _folders(source)[:8]) or "none"
        raise ValueError(f"source must have a folder images and a folder labels, got the folders {names} in {source}")


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _named(folder: Path, names: tuple[str, ...]) -> Path | None:
    by_name = {path.name.lower(): path for path in _folders(folder)}
    return next((by_name[name] for name in names if name in by_name), None)


def _name_file(source: Path) -> Path | None:
    return next((source / name for name in _NAME_FILES if (source / name).is_file()), None)


def _by_case(folder: Path) -> dict[str, Path]:
    """The files of a folder by their cases; a folder in it is a series of DICOM slices."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.name.lower().endswith(ENDINGS)):
            continue
        case = case_of_file(path)
        while (shorter := _AROUND.sub("", case, count=1)) != case and shorter:
            case = shorter
        if case in found:
            raise ValueError(f"{folder} must have one file for a case, got {found[case].name} and {path.name}")
        found[case] = path
    return found
