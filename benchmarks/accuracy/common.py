"""What the baselines share: reading a data set at one size, scoring at each image's own size, writing the result."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ntpseg.data import Record, load_records, prepare, read_image, read_truth, resize_mask
from ntpseg.evaluation.metrics import concatenate, segmentation_metrics
from ntpseg.evaluation.summary import summarise
from ntpseg.utils.files import write_json


def split(path: Path, name: str, limit: int | None = None) -> list[Record]:
    """The records of one split that have a mask, at most `limit` of them."""
    records = [r for r in load_records(path) if r.split == name and r.mask is not None]
    if not records:
        raise ValueError(f"data must have {name} records with masks, got {path}, which has none")
    return records[:limit]


def arrays(records: Sequence[Record], size: int, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 ``[N, C, S, S]`` in [-1, 1] and masks bool ``[N, S, S]``, as this package's model sees them."""
    images = np.empty((len(records), channels, size, size), np.float32)
    masks = np.empty((len(records), size, size), bool)
    for i, record in enumerate(records):
        image, mask = prepare(read_image(record.image), true_mask(record), size, channels)
        images[i] = image
        masks[i] = np.asarray(mask)[0] > 0.5
    return images, masks


def true_mask(record: Record) -> np.ndarray:
    """The mask of a record that has one, bool ``[H, W]``."""
    return read_truth(record)


def score(records: Sequence[Record], predict: Callable[[int], np.ndarray], threshold: float = 0.5) -> dict[str, Any]:
    """Summary of the metrics; `predict(i)` gives record i's foreground probability float ``[S, S]``."""
    parts = []
    for i, record in enumerate(records):
        truth = true_mask(record)
        parts.append(
            segmentation_metrics(
                resize_mask(predict(i), truth.shape[0], truth.shape[1], threshold=threshold)[None], truth[None]
            )
        )
    return summarise(concatenate(parts), [r.subject for r in records])


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Print the Dices, and write the whole result with the machine it comes from."""
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for name in (name for name in ("val", "test") if name in result):
        for family in ("per_image", "pooled"):
            dice = result[name][family]["dice"]
            print(f"{name} {family} Dice {dice['value']:.4f} [{dice['low']:.4f}, {dice['high']:.4f}]")
    if path is None:
        print(json.dumps(result, indent=2))
    else:
        write_json(path, result)
