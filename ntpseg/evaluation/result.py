"""The result of an evaluation and its files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntpseg.data.images import encode_png
from ntpseg.data.shards.files import PackedFile
from ntpseg.evaluation.metrics import COUNTS, METRICS, mm_metrics
from ntpseg.evaluation.volumes import VolumeScore, volume_metrics
from ntpseg.utils.files import atomic_folder, atomic_open, naming, remove_folder, write_csv, write_json
from ntpseg.utils.outputs import check_file, check_folder, check_not_inputs, is_inside, name_key, same_place

if TYPE_CHECKING:
    from ntpseg.data import Record
    from ntpseg.data.images import Window

MAX_NAME = 200


@dataclass
class Evaluation:
    """The result of `evaluate`: N cases.

    Attributes:
        records: the cases, in order.
        per_case: arrays of length N, see `segmentation_metrics`, and ``confidence`` (mean over patches) and ``ceiling``
            (Dice of the truth after going through the mask tokenizer: what no prediction can exceed by much),
            ``entropy`` (mean over pixels, in bits) and, of several samples, ``sample_dice`` (see `pairwise_dice`).
        summary: everything that goes into ``summary.json``.
        masks: predictions, bool ``[H, W]`` each.
        confidence: float32 ``[N, h, w]``.
        probability: uint8 ``[N, S, S]``, the calibrated foreground probability of every pixel at the model's size times
            255.
        checked: indices of the cases of the text check; `empty_dice`, `other_dice`, `other_text` and `other_masks`
            belong to them.
        windows: how each image of more than 8 bits was brought to 8 bits, see `read_windowed`; None for the others.
        volumes: the structures of each volume, see `score_volumes`; none where no image is a slice of a volume.
    """

    records: list[Record]
    per_case: dict[str, np.ndarray]
    summary: dict[str, Any]
    masks: list[np.ndarray]
    confidence: np.ndarray
    probability: np.ndarray
    checked: list[int] = field(default_factory=list)
    empty_dice: np.ndarray | None = None
    other_dice: np.ndarray | None = None
    other_text: list[str] = field(default_factory=list)
    other_masks: list[np.ndarray] = field(default_factory=list)
    windows: Sequence[Window | None] = ()
    volumes: Sequence[VolumeScore] = ()

    def write(self, directory: Path) -> None:
        """Write ``summary.json``, ``cases.csv``, two arrays and the masks, in place of an earlier result's.

        Where images are slices of volumes, ``volumes.csv`` has their scores. The arrays are ``confidence.npy`` and
        ``probability.npy``.

        ``masks/FILE.png`` are the predictions, ``masks_other/FILE.png`` those for another image's text; the column
        ``file`` of the table says which case each one is.
        """
        names = file_names([r.case for r in self.records])
        _write_masks(directory / "masks", dict(zip(names, self.masks, strict=True)))
        if self.other_masks:
            others = dict(zip((names[i] for i in self.checked), self.other_masks, strict=True))
            _write_masks(directory / "masks_other", others)
        else:
            remove_folder(directory / "masks_other")
        with atomic_open(directory / "confidence.npy") as file:
            np.save(file, self.confidence.astype(np.float16))
        with atomic_open(directory / "probability.npy") as file:
            np.save(file, self.probability)
        columns, rows = self._table(names)
        write_csv(directory / "cases.csv", columns, rows)
        if self.volumes:
            write_csv(directory / "volumes.csv", *volume_table(self.volumes))
        else:
            (directory / "volumes.csv").unlink(missing_ok=True)
        write_json(directory / "summary.json", self.summary)

    def _table(self, names: list[str]) -> tuple[list[str], list[list[Any]]]:
        scores = [*METRICS, "confidence", "ceiling", "entropy"]
        scores += ["sample_dice"] if "sample_dice" in self.per_case else []
        columns = ["case", "subject", "text", "file", "image", "mask", "mask_value", "image_sha1", "window"]
        columns += ["height", "width"]
        columns += [*scores, *COUNTS, "empty_text_dice", "other_text", "other_text_dice"]
        millimetres = [name for name in mm_metrics() if name in self.per_case]
        placed = any(record.place is not None for record in self.records)
        columns += [*(_PLACE if placed else ()), *millimetres]
        position = {i: n for n, i in enumerate(self.checked)}
        rows = []
        for i, record in enumerate(self.records):
            row: list[Any] = [
                record.case,
                record.subject,
                record.text,
                names[i],
                record.image,
                record.mask,
                record.mask_value,
            ]
            window = self.windows[i] if self.windows else None
            row += [hashlib.sha1(record.image.read_bytes()).hexdigest()[:16], "" if window is None else str(window)]
            row += self.masks[i].shape
            row += [f"{self.per_case[name][i]:.6g}" for name in scores]
            row += [int(self.per_case[name][i]) for name in COUNTS]
            n = position.get(i)
            row.append("" if n is None or self.empty_dice is None else f"{self.empty_dice[n]:.6g}")
            if n is None or self.other_dice is None:
                row += ["", ""]
            else:
                row += [self.other_text[n], f"{self.other_dice[n]:.6g}"]
            row += _place_cells(record) if placed else []
            row += [_known(self.per_case[name][i]) for name in millimetres]
            rows.append(row)
        return columns, rows


_PLACE = ("volume", "axis", "slice", "slice_mm", "row_mm", "column_mm", "modality", "structure")


def _place_cells(record: Record) -> list[Any]:
    place = record.place
    if place is None:
        return [""] * len(_PLACE)
    index = place.index if place.volume else ""
    spacing = ["" if value is None else value for value in (place.slice_mm, place.row_mm, place.column_mm)]
    return [place.volume, place.axis, index, *spacing, place.modality, place.structure]


def _known(value: float | None) -> str:
    """A score, or nothing where it is not known."""
    return "" if value is None or not np.isfinite(value) else f"{value:.6g}"


def volume_table(volumes: Sequence[VolumeScore]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of ``volumes.csv``: millimetres of a scored slice's distance to the next, volumes in ml."""
    metrics = volume_metrics()
    columns = ["volume", "structure", "text", "subject", "axis", "slices", "missing", "step"]
    columns += ["slice_mm", "row_mm", "column_mm", *metrics, "true_ml", "predicted_ml", *COUNTS]
    rows = []
    for v in volumes:
        row: list[Any] = [v.volume, v.structure, v.text, v.subject, v.axis, v.slices, v.missing, v.step]
        row += [f"{value:.6g}" for value in v.voxel_mm] if v.voxel_mm else ["", "", ""]
        row += [_known(v.scores.get(name)) for name in metrics]
        row += [_known(None if v.voxel_ml is None else voxels * v.voxel_ml) for voxels in (v.true, v.predicted)]
        rows.append([*row, v.intersection, v.predicted, v.true])
    return columns, rows


def _write_masks(folder: Path, masks: dict[str, np.ndarray]) -> None:
    with atomic_folder(folder) as building:
        for name, mask in masks.items():
            with naming(folder / f"{name}.png"):
                (building / f"{name}.png").write_bytes(encode_png(mask))


def check_result_folder(directory: Path, records: Sequence[Record], inputs: Sequence[Path] = ()) -> None:
    """Refuse a result folder in which `Evaluation.write` would replace anything but an earlier result.

    Args:
        directory: the folder.
        records: the cases that are read.
        inputs: further files and folders that are read.

    Raises:
        ValueError: it cannot be written to, is the data set, or its ``masks/`` or a file of it is no earlier result's
            or is read.
    """
    check_folder("--out", directory)
    # A file in a shard is no place that anything could be written to.
    read = [p for r in records for p in (r.image, r.mask) if p is not None and not isinstance(p, PackedFile)]
    folders = [directory / name for name in ("masks", "masks_other")]
    for path in inputs:
        if path.is_dir() and same_place(directory, path):
            raise ValueError(f"--out must not be the folder of the data, got {directory}; choose another")
    parents = {path.parent for path in (*read, *inputs)}
    for folder in folders:
        held = next((p for p in parents if is_inside(p, folder)), None)
        if held is not None:
            raise ValueError(f"--out must not replace what is read, got {directory}, whose {folder.name}/ is read")
        earlier = all((directory / name).is_file() for name in ("cases.csv", "summary.json"))
        if folder.exists() and not earlier:
            raise ValueError(
                f"--out must be a new folder or that of an earlier evaluation, got {directory} with a {folder.name}/ "
                "and no cases.csv and summary.json; choose another"
            )
    names = ("summary.json", "cases.csv", "volumes.csv", "confidence.npy", "probability.npy")
    files = [directory / name for name in names]
    check_not_inputs("--out", files, [*read, *inputs])
    for file in files:
        check_file("--out", file)


def file_names(cases: Sequence[str]) -> list[str]:
    """A distinct file name without extension for every case; cases may hold slashes or other odd characters.

    Names are cut to `MAX_NAME` bytes: a table's cases may be longer than names of files can be.
    """
    names: list[str] = []
    seen: set[str] = set()
    for case in cases:
        base = re.sub(r"[^\w.\-]+", "_", case).encode()[:MAX_NAME].decode("utf-8", "ignore") or "case"
        name, n = base, 1
        while name_key(name) in seen:
            n += 1
            name = f"{base}_{n}"
        seen.add(name_key(name))
        names.append(name)
    return names
