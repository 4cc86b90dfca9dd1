"""nnU-Net's raw data sets: ``dataset.json`` of versions 1 and 2, and of the Medical Segmentation Decathlon.

The subject of a case is its name. ``labelsTs``, where it is there, makes the test split; cases of ``labelsTr`` are
dealt out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntpseg.data.records import subject_of
from ntpseg.importers.base import Case
from ntpseg.importers.loading import ENDINGS, case_of_file, chosen_channels, load_pair
from ntpseg.importers.names import names_of
from ntpseg.importers.options import ImportOptions
from ntpseg.importers.templates import read_mapping

_CHANNEL = re.compile(r"_(\d{4})$")
# nnU-Net names the normalisation with the channel's name.
_MODALITIES = {"ct": "CT", "mri": "MR", "mr": "MR", "t1": "MR", "t2": "MR", "flair": "MR", "t1w": "MR", "t2w": "MR",
               "t1gd": "MR", "t1ce": "MR", "adc": "MR", "dwi": "MR", "pet": "PT"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Entry:
    case: str
    images: dict[int, Path]
    labels: Path | None
    split: str


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the cases of a folder with ``dataset.json``; `source` may be that file.

    Raises:
        ValueError: ``dataset.json`` is missing, unreadable or incomplete, a case has no image or lacks a channel, or
            there are several channels and `options` choose none.
    """
    path = source / "dataset.json" if source.is_dir() else source
    if not path.is_file():
        raise ValueError(f"source must be a folder with nnU-Net's dataset.json, got {source}, which has none")
    content = read_mapping(path, "dataset.json")
    if "labels" not in content:
        raise ValueError(f"{path} must have labels, got the keys {', '.join(map(str, content)) or 'none'}")
    names = names_of(content["labels"], str(path))
    channels = _channel_names(content, path)
    chosen = chosen_channels(channels, options.channels)
    modalities = [_MODALITIES.get(channels[number].lower(), "") for number in chosen]
    entries = (
        _listed(path.parent, content, path) if "dataset" in content else _found(path.parent, content, len(channels))
    )
    if not any(entry.labels for entry in entries):
        raise ValueError(f"{path} must lie beside labelsTr with at least one label map, got none")
    cases = []
    for entry in entries:
        if entry.labels is None:
            cases.append(Case(entry.case, subject_of(entry.case), None))
            continue
        missing = [number for number in chosen if number not in entry.images]
        if missing:
            raise ValueError(
                f"case {entry.case} of {path.parent} must have an image of every channel, got none of channel "
                f"{missing[0]} ({channels[missing[0]]})"
            )
        images = [entry.images[number] for number in chosen]
        # The Decathlon keeps several channels in one 4-D file.
        together = len(channels) > 1 and len(set(entry.images.values())) == 1
        load = functools.partial(
            load_pair,
            entry.case,
            images,
            entry.labels,
            names.structures,
            ignored=names.ignored,
            modalities=modalities,
            series=[str(number) if together else None for number in chosen],
            resample=options.resample,
        )
        cases.append(Case(entry.case, subject_of(entry.case), load, entry.split, names.structures))
    return cases


def _channel_names(content: dict[Any, Any], path: Path) -> dict[int, str]:
    names = content.get("channel_names", content.get("modality"))
    if names is None:
        return {0: "image"}
    if not isinstance(names, dict) or not names or not all(str(number).isdecimal() for number in names):
        raise ValueError(f"channel_names of {path} must map numbers to names, got {names!r}")
    return {int(number): str(name) for number, name in names.items()}


def _listed(folder: Path, content: dict[Any, Any], path: Path) -> list[_Entry]:
    """Version 2 may list the files: {"dataset": {case: {"images": [...], "label": ...}}}."""
    entries = []
    for case, files in content["dataset"].items():
        if not isinstance(files, dict) or not isinstance(files.get("images"), list) or "label" not in files:
            raise ValueError(f"dataset of {path} must give images and label of each case, got {files!r} of {case}")
        images = {number: _existing(folder / name, path) for number, name in enumerate(files["images"])}
        entries.append(_Entry(str(case), images, _existing(folder / files["label"], path), ""))
    return entries


def _existing(path: Path, table: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{table} must list files that are there, got {path}")
    return path


def _found(folder: Path, content: dict[Any, Any], channels: int) -> list[_Entry]:
    ending = str(content.get("file_ending", ""))
    entries = []
    for part, split in (("Tr", ""), ("Ts", "test")):
        labels, images = folder / f"labels{part}", folder / f"images{part}"
        files = _files(labels, ending)
        pictures = _pictures(_files(images, ending), ending, channels)
        for path in files:
            case = path.name[: -len(ending)] if ending else case_of_file(path)
            if case not in pictures:
                raise ValueError(f"label map {path} must have its image in {images}, got none of case {case}")
            entries.append(_Entry(case, pictures.pop(case), path, split))
        # Of a test set nnU-Net itself asks for no labels.
        entries += [_Entry(case, images, None, split) for case, images in pictures.items() if part == "Tr"]
    return entries


def _pictures(files: Sequence[Path], ending: str, channels: int) -> dict[str, dict[int, Path]]:
    """The image of every channel of every case."""
    found: dict[str, dict[int, Path]] = {}
    for path in files:
        name = path.name[: -len(ending)] if ending else case_of_file(path)
        if match := _CHANNEL.search(name):
            found.setdefault(name[: match.start()], {})[int(match[1])] = path
        else:
            # The Decathlon has no number in the names of its images, and all channels in one file.
            found[name] = dict.fromkeys(range(channels), path)
    return found


def _files(folder: Path, ending: str) -> Sequence[Path]:
    """Label maps or images; macOS leaves files that begin with a dot beside them."""
    if not folder.is_dir():
        return []
    endings = (ending.lower(),) if ending else ENDINGS
    return sorted(
        path for path in folder.iterdir() if path.name.lower().endswith(endings) and not path.name.startswith(".")
    )
