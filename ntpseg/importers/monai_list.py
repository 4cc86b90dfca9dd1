"""MONAI's data lists: a JSON file with lists such as "training", of entries {"image": ..., "label": ...}.

Paths are relative to the file. The lists "training", "validation" and "test" (or "testing") are the splits, as far as
their entries have a label; without a validation list the entries of "fold" 0 are it, as in MONAI's Auto3DSeg. The names
of the labels are in "labels", as in the Decathlon's files, or in the file of ``--names``.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

from ntpseg.data.records import subject_of
from ntpseg.importers.base import Case
from ntpseg.importers.loading import case_of_file, chosen_channels, load_pair
from ntpseg.importers.names import names_of, read_names
from ntpseg.importers.options import ImportOptions
from ntpseg.importers.templates import read_mapping
from ntpseg.utils.checks import brief

_LISTS = {"training": "train", "train": "train", "validation": "val", "val": "val", "test": "test", "testing": "test"}
_SUBJECTS = ("subject", "subject_id", "patient", "patient_id")


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the labelled entries of a data list.

    Raises:
        ValueError: the file is unreadable, has no list, an entry is incomplete or names a file that is not there.
    """
    if source.is_dir():
        lists = sorted(source.glob("*.json"))
        if len(lists) != 1:
            raise ValueError(f"source must be MONAI's data list (JSON), got {source} with {len(lists)} JSON files")
        source = lists[0]
    content = read_mapping(source, "source")
    entries = [(key, entry) for key in content if key in _LISTS for entry in _entries(source, key, content[key])]
    if not entries:
        raise ValueError(f"{source} must have a list training, validation or test with labels, got none")
    named = (
        names_of(content["labels"], str(source))
        if "labels" in content and options.names is None
        else read_names(options.names)
    )
    channels = content.get("modality", content.get("channel_names", {}))
    if isinstance(channels, str):
        channels = {"0": channels}
    elif not isinstance(channels, dict):
        channels = {}
    names_of_cases = _case_names([source.parent / entry["label"] for _, entry in entries])
    listed = {_LISTS[key] for key, _ in entries}
    cases = [Case(name, subject_of(name), None) for key in content for name in _unlabelled(key, content[key])]
    for (key, entry), case in zip(entries, names_of_cases):
        images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
        names = {number: str(channels.get(str(number), number)) for number in range(len(images))}
        chosen = chosen_channels(names, options.channels)
        paths = [_existing(source, images[number]) for number in chosen]
        labels = _existing(source, entry["label"])
        split = _LISTS[key]
        if split == "train" and "val" not in listed and "fold" in entry:
            split = "val" if entry["fold"] == 0 else "train"
        elif split == "train" and "val" not in listed:
            split = ""  # subjects are dealt out, but to the splits that have a list
        subject = next((str(entry[name]) for name in _SUBJECTS if entry.get(name)), subject_of(case))
        load = functools.partial(
            load_pair,
            case,
            paths,
            labels,
            named.structures,
            ignored=named.ignored,
            modalities=_modalities(names, chosen),
            resample=options.resample,
        )
        cases.append(Case(case, subject, load, split, named.structures))
    return cases


def _case_names(labels: list[Path]) -> list[str]:
    """The names of the label files; where each case has a folder of its own, and its file one name, the folders'."""
    names = [case_of_file(path) for path in labels]
    if len(set(names)) == len(names):
        return names
    common = Counter(names)
    return [f"{path.parent.name}_{name}" if common[name] > 1 else name for name, path in zip(names, labels)]


def _modalities(names: dict[int, str], chosen: list[int]) -> list[str]:
    return [{"CT": "CT", "MRI": "MR", "MR": "MR"}.get(names[number].upper(), "") for number in chosen]


def _entries(source: Path, key: str, entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list):
        raise ValueError(f"{key} of {source} must be a list, got {brief(entries)}")
    labelled = [entry for entry in entries if _is_labelled(entry)]
    for entry in labelled:
        images = entry.get("image")
        paths = images if isinstance(images, list) else [images]
        if not paths or not all(isinstance(path, str) for path in (*paths, entry["label"])):
            raise ValueError(f"{key} of {source} must give paths of image and label, got {brief(entry)}")
    return labelled


def _unlabelled(key: str, entries: list[Any]) -> list[str]:
    """Cases of entries without a label, and of names alone; in a test list they are images to predict."""
    if _LISTS.get(key, "test") == "test":
        return []
    images = [entry.get("image") if isinstance(entry, dict) else entry for entry in entries if not _is_labelled(entry)]
    images = [image[0] if isinstance(image, list) and image else image for image in images]
    return [case_of_file(Path(image)) if isinstance(image, str) else brief(image) for image in images]


def _is_labelled(entry: Any) -> bool:
    return isinstance(entry, dict) and bool(entry.get("label"))


def _existing(source: Path, name: str) -> Path:
    path = source.parent / name
    if not path.exists():
        raise ValueError(f"{source} must list files that are there, got {name}; paths are relative to its folder")
    return path
