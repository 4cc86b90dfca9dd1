"""Small files for the data tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
from PIL import Image


def square(size: int = 16, at: int = 4) -> np.ndarray:
    """A mask with one square of foreground."""
    mask = np.zeros((size, size), np.uint8)
    mask[at : at + size // 4, at : at + size // 4] = 255
    return mask


def picture(size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size)).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pandas.DataFrame(rows)
    frame.to_excel(path, index=False) if path.suffix == ".xlsx" else frame.to_csv(path, index=False)
    return path
