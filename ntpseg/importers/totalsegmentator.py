"""TotalSegmentator's layout: a folder for each subject, with the image and a folder of one mask for each structure.

::

    SRC/s0001/ct.nii.gz (or mri.nii.gz)
    SRC/s0001/segmentations/kidney_left.nii.gz, ...
    SRC/meta.csv    with image_id and split, as the released data set has it; may be absent
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path

from ntpseg.importers.base import Case, Sample, Structure
from ntpseg.importers.loading import LayerPacker, case_of_file, load_channels, load_labels
from ntpseg.importers.options import ImportOptions

_ENDINGS = (".nii.gz", ".nii")
_IMAGES = {"ct": "CT", "mri": "MR", "mr": "MR", "image": ""}


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the subjects of `source`.

    Raises:
        ValueError: no folder in it has an image and segmentations.
    """
    folders = [source] if (source / "segmentations").is_dir() else sorted(source.glob("*/segmentations"))
    folders = [folder if folder == source else folder.parent for folder in folders]
    splits = _splits(source / "meta.csv")
    cases = []
    for folder in folders:
        images = [path for path in sorted(folder.iterdir()) if path.name.lower().endswith(_ENDINGS)]
        named = [path for path in images if case_of_file(path).lower() in _IMAGES] or images
        if len(named) != 1:
            raise ValueError(f"{folder} must hold one image beside segmentations, such as ct.nii.gz, got {len(named)}")
        modality = _IMAGES.get(case_of_file(named[0]).lower(), "")
        masks = sorted(
            path
            for path in (folder / "segmentations").iterdir()
            if path.name.lower().endswith(_ENDINGS) and not path.name.startswith(".")
        )
        load = functools.partial(_load, folder.name, named[0], masks, modality, options.resample)
        cases.append(Case(folder.name, folder.name, load, splits.get(folder.name, "")))
    cases += [Case(folder.name, folder.name, None) for folder in _unlabelled(source) if cases]
    if not cases:
        raise ValueError(f"source must hold folders with ct.nii.gz and segmentations, got none in {source}")
    return cases


def _unlabelled(source: Path) -> list[Path]:
    """Folders with an image and no segmentations."""
    images = (path for path in sorted(source.glob("*/*")) if path.name.lower().endswith(_ENDINGS))
    folders = {path.parent for path in images if case_of_file(path).lower() in _IMAGES}
    return sorted(folder for folder in folders if not (folder / "segmentations").is_dir())


def _load(name: str, image: Path, masks: list[Path], modality: str, resample: bool) -> Sample:
    volumes = load_channels(name, [image], [modality])
    packer = LayerPacker(volumes[0].voxels.shape[:3])
    structures = []
    for path in masks:
        mask = load_labels(f"{name}, {path.name}", path, volumes[0], resample) > 0
        structures.append(Structure(case_of_file(path), (packer.add(mask),) if mask.any() else ()))
    return Sample(volumes, tuple(packer.layers), tuple(structures), modality)


def _splits(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    rows = csv.DictReader(text.splitlines(), delimiter=";" if ";" in text.partition("\n")[0] else ",")
    return {row["image_id"]: row["split"] for row in rows if row.get("image_id") and row.get("split")}
