"""Small packed data sets for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from dataset_files import picture, save, square, table

from ntpseg.data.shards.writing import PackOptions, pack_dataset


def folder_of(path: Path, pairs: int = 12, size: int = 16) -> Path:
    """A manifest of different pairs: two of three for training, the others for validation and test by turns."""
    rows = []
    for i in range(pairs):
        image, mask = f"img/p{i}.png", f"lab/p{i}.png"
        save(path / image, picture(size, seed=i))
        save(path / mask, square(size, at=1 + i % (size // 2)))
        split = "train" if i % 3 else "val" if i % 2 else "test"
        rows.append({"image": image, "mask": mask, "text": f"The square {i}.", "split": split, "subject": f"s{i}"})
    table(path / "manifest.csv", rows)
    return path


def packed(path: Path, pairs: int = 12, **options: object) -> Path:
    """`folder_of`, packed; in several shards by default."""
    out = path / "set"
    pack_dataset(folder_of(path / "folder", pairs), out, PackOptions(**{"shard_bytes": 900, **options}))  # type: ignore[arg-type]
    return out


def damage(path: Path, at: int | None = None) -> None:
    """Change a byte of a file, or cut it at `at`."""
    content = bytearray(path.read_bytes())
    if at is not None:
        path.write_bytes(bytes(content[:at]))
        return
    # In the middle of the first picture, whose bytes no footer or header holds.
    content[content.index(b"IDAT") + 12] ^= 1
    path.write_bytes(bytes(content))


def same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and np.array_equal(first, second)
