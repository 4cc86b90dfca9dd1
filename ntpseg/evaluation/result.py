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
from ntpseg.evaluation.metrics import COUNTS, METRICS
from ntpseg.utils.files import atomic_folder, atomic_open, remove_folder, write_csv, write_json

if TYPE_CHECKING:
    from ntpseg.data import Record


@dataclass
class Evaluation:
    """The result of `evaluate`: N cases.

    Attributes:
        records: the cases, in order.
        per_case: arrays of length N, see `segmentation_metrics`, and ``confidence`` (mean over patches) and ``ceiling``
            (Dice of the truth after going through the mask tokenizer: what no prediction can exceed by much).
        summary: everything that goes into ``summary.json``.
        masks: predictions, bool ``[H, W]`` each.
        confidence: float32 ``[N, h, w]``.
        probability: uint8 ``[N, S, S]``, the foreground probability of every pixel at the model's size times 255.
        checked: indices of the cases of the text check; `empty_dice`, `other_dice`, `other_text` and `other_masks`
            belong to them.
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

    def write(self, directory: Path) -> None:
        """Write ``summary.json``, ``cases.csv``, two arrays and the masks, in place of an earlier result's.

        The arrays are ``confidence.npy`` and ``probability.npy``.

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
        write_json(directory / "summary.json", self.summary)

    def _table(self, names: list[str]) -> tuple[list[str], list[list[Any]]]:
        scores = [*METRICS, "confidence", "ceiling"]
        columns = ["case", "subject", "text", "file", "image", "mask", "mask_value", "image_sha1", "height", "width"]
        columns += [*scores, *COUNTS, "empty_text_dice", "other_text", "other_text_dice"]
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
            row += [hashlib.sha1(record.image.read_bytes()).hexdigest()[:16], *self.masks[i].shape]
            row += [f"{self.per_case[name][i]:.6g}" for name in scores]
            row += [int(self.per_case[name][i]) for name in COUNTS]
            n = position.get(i)
            row.append("" if n is None or self.empty_dice is None else f"{self.empty_dice[n]:.6g}")
            if n is None or self.other_dice is None:
                row += ["", ""]
            else:
                row += [self.other_text[n], f"{self.other_dice[n]:.6g}"]
            rows.append(row)
        return columns, rows


def _write_masks(folder: Path, masks: dict[str, np.ndarray]) -> None:
    with atomic_folder(folder) as building:
        for name, mask in masks.items():
            (building / f"{name}.png").write_bytes(encode_png(mask))


def file_names(cases: Sequence[str]) -> list[str]:
    """A distinct file name without extension for every case; cases may hold slashes or other odd characters."""
    names: list[str] = []
    seen: set[str] = set()
    for case in cases:
        base = re.sub(r"[^\w.\-]+", "_", case) or "case"
        name, n = base, 1
        while name.lower() in seen:
            n += 1
            name = f"{base}_{n}"
        seen.add(name.lower())
        names.append(name)
    return names
