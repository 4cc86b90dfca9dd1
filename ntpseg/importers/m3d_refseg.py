"""M3D-RefSeg: CT volumes, a label map of lesions each, and what is said of every label.

::

    SRC/M3D_RefSeg_train.csv, SRC/M3D_RefSeg_test.csv         or M3D_RefSeg_all.csv, or one table as SRC, or none
    SRC/M3D_RefSeg/s0000/{ct.nii.gz, mask.nii.gz, text.json}  or the folders s0000 in SRC itself
    SRC/M3D_RefSeg_npy/s0000/{ct.npy, mask.npy, text.json}    as M3D's m3d_refseg_data_prepare.py writes them

After https://huggingface.co/datasets/GoodBaiBai88/M3D-RefSeg and https://github.com/BAAI-DCAI/M3D
(``Data/process/m3d_refseg_data_prepare.py``, ``LaMed/src/dataset/multi_dataset.py``): the tables have the columns
Image, Mask, Mask_ID (the label's value in this volume), Question_Type, Question and Answer; text.json maps a label's
value to its description. Sentences of a label are its description and all its questions. A volume is in the split of
the table that names it.

The .npy files have neither orientation nor millimetres: axes are taken as that script leaves them, ``[1, k, i, j]`` of
NIfTI in RAS as TotalSegmentator stores it. Of both, the NIfTI file is used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ntpseg.data.layouts.annotations import read_json
from ntpseg.data.layouts.folders import plain_number
from ntpseg.data.tables import is_sentence, read_columns
from ntpseg.importers.alignment import integer_labels
from ntpseg.importers.base import Case, Sample, Structure
from ntpseg.importers.loading import load_pair
from ntpseg.importers.options import ImportOptions
from ntpseg.volumes import Header, Volume

_FOLDERS = ("", "M3D_RefSeg", "M3D_RefSeg_npy")
_COLUMNS = ("image", "mask", "mask_id", "question")
# NIfTI's RAS in LPS.
_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
Sentences = dict[int, list[str]]


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the volumes.

    Raises:
        ValueError: there is no volume; a table is malformed; or a volume is in both tables.
    """
    root = source.parent if source.is_file() else source
    tables = _tables(source)
    splits: dict[str, str] = {}
    questions: dict[str, Sentences] = {}
    for path, split in tables:
        table = read_columns(path, _COLUMNS)
        if not options.skip_bad:
            table.refuse_faults()
        for row in table.rows:
            volume = _volume_name(row["image"])
            where = f"{path.name} row {row.number}"
            if not volume:
                raise ValueError(f"{where} must name an image such as s0000/ct.nii.gz, got {row['image']!r}")
            if split and splits.setdefault(volume, split) != split:
                raise ValueError(
                    f"{where} must name a volume of one split, got {volume}, which is in {splits[volume]} already; "
                    "give M3D_RefSeg_all.csv as SRC: then volumes are dealt out as --splits says"
                )
            value = plain_number(row["mask_id"])
            if not value.isdecimal():
                raise ValueError(f"{where} must have the value of a label as Mask_ID, got {row['mask_id']!r}")
            found = questions.setdefault(volume, {}).setdefault(int(value), [])
            if is_sentence(row["question"]):
                found.append(row["question"])
            elif not options.skip_bad:
                raise ValueError(f"{where} must have a sentence as Question, got {row['question']!r}")
    folders = {path.name: path for name in reversed(_FOLDERS) for path in _volumes(root / name)}
    if not folders:
        raise ValueError(
            f"source must hold folders such as M3D_RefSeg/s0000 with ct.nii.gz and mask.nii.gz, got {root}"
        )
    names = list(dict.fromkeys([*questions, *folders])) if not tables else list(questions)
    return [
        Case(
            name,
            name,
            functools.partial(_load, name, folders.get(name), root, questions.get(name, {}), options.resample),
            splits.get(name, ""),
        )
        for name in names
    ]


def _tables(source: Path) -> list[tuple[Path, str]]:
    """The tables with the split that each stands for."""
    if source.is_file():
        stem = source.stem.lower()
        return [(source, next((split for split in ("train", "test") if stem.endswith(f"_{split}")), ""))]
    found: list[tuple[Path, str]] = []
    for folder in (source / name for name in _FOLDERS):
        # M3D's own training reads M3D_RefSeg.csv for training beside the other for the test.
        for names, split in ((("M3D_RefSeg_train.csv", "M3D_RefSeg.csv"), "train"), (("M3D_RefSeg_test.csv",), "test")):
            path = next((folder / name for name in names if (folder / name).is_file()), None)
            if path is not None and split not in {given for _, given in found}:
                found.append((path, split))
    if {split for _, split in found} == {"train"} and found[0][0].name == "M3D_RefSeg.csv":
        return [(found[0][0], "")]
    whole = (source / name / "M3D_RefSeg_all.csv" for name in _FOLDERS)
    return found or [(path, "") for path in whole if path.is_file()][:1]


def _volumes(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and _pair(path) is not None]


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """Image and label map of a volume's folder; None where it has no image."""
    for suffix in (".nii.gz", ".nii", ".npy"):
        if (folder / f"ct{suffix}").is_file():
            return folder / f"ct{suffix}", folder / f"mask{suffix}"
    return None


def _volume_name(image: str) -> str:
    parts = [part for part in image.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return parts[-2] if len(parts) > 1 else ""


def _load(name: str, folder: Path | None, root: Path, questions: Sentences, resample: bool) -> Sample:
    pair = None if folder is None else _pair(folder)
    if folder is None or pair is None:
        raise ValueError(f"{root} must hold the folder {name} with ct.nii.gz, which a table names, got none")
    image, labels = pair
    if not labels.is_file():
        raise ValueError(f"{folder} must have {labels.name} beside {image.name}, got none")
    structures = _structures(folder, questions)
    if image.suffix == ".npy":
        return _load_arrays(name, image, labels, structures)
    return load_pair(name, [image], labels, structures, modalities=("CT",), resample=resample)


def _structures(folder: Path, questions: Sentences) -> tuple[Structure, ...]:
    sentences: Sentences = {}
    path = folder / "text.json"
    if path.is_file():
        try:
            described = read_json(path)
            if not isinstance(described, dict):
                raise ValueError("no object; it maps values of labels to descriptions")
        except ValueError as error:
            raise ValueError(f"{path} must be a JSON file of descriptions, got {error}") from error
        for key, text in described.items():
            if str(key).isdecimal() and isinstance(text, str) and is_sentence(text):
                sentences[int(key)] = [text.strip()]
    for value, asked in questions.items():
        sentences.setdefault(value, []).extend(asked)
    if not any(sentences.values()):
        raise ValueError(f"{folder} must have a sentence for some label, got none in text.json and in the tables")
    # What is said of a lesion is asked for in vain in the slices that do not show it.
    return tuple(
        Structure(f"lesion {value}", ((0, value),), unique, unique)
        for value, texts in sorted(sentences.items())
        if value and (unique := tuple(dict.fromkeys(texts)))
    )


def _load_arrays(name: str, image: Path, labels: Path, structures: tuple[Structure, ...]) -> Sample:
    voxels, values = (_array(path) for path in (image, labels))
    if voxels.shape != values.shape:
        raise ValueError(
            f"{labels} must have the shape of {image.name}, {list(voxels.shape)}, got {list(values.shape)}"
        )
    header = Header(source="array", spacing_known=False)
    volume = Volume.from_stored(voxels, _RAS, header)
    turned = Volume.from_stored(integer_labels(name, values), _RAS, header)
    # No modality: the values are no Hounsfield units any more, but 0..1.
    return Sample((volume,), (turned.voxels,), structures)


def _array(path: Path) -> np.ndarray:
    """[D, H, W] of a file with [1, k, i, j] or [k, i, j]."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} must be a NumPy array, got {' '.join(str(error).split())}") from error
    array = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    if array.ndim != 3:
        raise ValueError(f"{path} must hold an array [1, D, H, W], got {list(array.shape)}")
    return array.swapaxes(1, 2)
