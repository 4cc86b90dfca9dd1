"""3D Slicer's segmentations, ``X.seg.nrrd``, beside the volumes that they were drawn on.

The volume of ``X.seg.nrrd`` is the file or DICOM folder ``X`` beside it, or the only other volume in its folder. Slicer
stores the part of the grid that holds a segment, and overlapping segments as layers; both are read as they are.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ntpseg.data.records import subject_of
from ntpseg.importers.alignment import aligned_labels
from ntpseg.importers.base import Case, Sample, Structure
from ntpseg.importers.loading import ENDINGS, case_of_file, load_channels
from ntpseg.importers.options import ImportOptions
from ntpseg.volumes import Header, Volume

ENDING = ".seg.nrrd"
_SEGMENT = re.compile(r"Segment(\d+)_(Name|LabelValue|Layer)")


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the segmentations of a folder and the folders in it, or the one file.

    Raises:
        ValueError: there is none, or its volume is not beside it.
    """
    files = [source] if source.is_file() else sorted(source.rglob(f"*{ENDING}"))
    if not files or not files[0].name.lower().endswith(ENDING):
        raise ValueError(f"source must hold files *{ENDING} of 3D Slicer, got none in {source}")
    cases = []
    for path in files:
        image = _image_of(path)
        stem = path.name[: -len(ENDING)]
        # Slicer calls every segmentation "Segmentation": the folder, or the volume, tells which it is.
        several = sum(other.parent == path.parent for other in files) > 1
        name = stem if several or path.parent == source or source.is_file() else path.parent.name
        if name.lower() in ("segmentation", "seg"):
            name = case_of_file(image)
        load = functools.partial(_load, name, image, path, options.resample)
        cases.append(Case(name, subject_of(name), load))
    return cases


def _image_of(path: Path) -> Path:
    stem = path.name[: -len(ENDING)]
    others = [
        other
        for other in sorted(path.parent.iterdir())
        if not other.name.startswith(".")
        and not other.name.lower().endswith(ENDING)
        and (other.is_dir() or other.name.lower().endswith(ENDINGS))
    ]
    named = [other for other in others if case_of_file(other) == stem]
    files = [other for other in others if not other.is_dir()] or others
    chosen = named or (files if len(files) == 1 else [])
    if len(chosen) != 1:
        names = ", ".join(other.name for other in (named or files)[:5]) or "none"
        raise ValueError(
            f"{path} must have its volume beside it, as {stem}.nrrd, {stem}.nii.gz or the only other one, got {names}"
        )
    return chosen[0]


def _load(name: str, image: Path, path: Path, resample: bool) -> Sample:
    volumes = load_channels(name, [image])
    layers, structures = read_segmentation(path)
    labels = tuple(aligned_labels(name, volumes[0], layer, resample=resample, cropped=True) for layer in layers)
    return Sample(volumes, labels, structures, ignored=frozenset())


def read_segmentation(path: Path) -> tuple[list[Volume], tuple[Structure, ...]]:
    """The layers of a ``.seg.nrrd``, label maps of one grid, and its segments.

    Raises:
        ValueError: SimpleITK is missing, the file cannot be read, or no segment is named in it.
    """
    import numpy as np

    from ntpseg.volumes.extras import require
    from ntpseg.volumes.itk import open_itk

    sitk = require("SimpleITK", "medical", "segmentations of 3D Slicer")
    image = open_itk(path)
    segments: dict[int, dict[str, str]] = {}
    for key in image.GetMetaDataKeys():
        if match := _SEGMENT.fullmatch(key):
            segments.setdefault(int(match[1]), {})[match[2]] = image.GetMetaData(key).strip()
    if not segments:
        raise ValueError(f"{path} must name its segments (Segment0_Name, ...), got none; save it with 3D Slicer")
    values = sitk.GetArrayFromImage(image)
    values = values if values.ndim == 4 else values[..., None]
    structures: dict[str, Structure] = {}
    for number, segment in sorted(segments.items()):
        # Slicer before 4.11 wrote a layer of 0 and 1 for every segment, and no more than names.
        old = "LabelValue" not in segment
        layer = int(segment.get("Layer", number if old else 0))
        value = 1 if old else int(segment["LabelValue"])
        name = segment.get("Name") or f"Segment {number + 1}"
        if not 0 <= layer < values.shape[3]:
            raise ValueError(f"segment {name!r} of {path} must be in one of {values.shape[3]} layers, got {layer}")
        parts = (*(structures[name].parts if name in structures else ()), (layer, value))
        structures[name] = Structure(name, parts)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    header = Header("nrrd")
    layers = [Volume.from_stored(values[..., layer], affine, header) for layer in range(values.shape[3])]
    return layers, tuple(structures.values())
