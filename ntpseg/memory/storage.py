"""Where the memory's rows lie: on the device, in host memory, or in files mapped into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntpseg.utils.files import write_json

KINDS = ("device", "pinned", "mapped")


def content_key(items: Iterable[str | bytes]) -> str:
    """Return a key of a data set's content and order, for `ntpseg.HardTokenMemory`'s ``key``.

    Args:
        items: one string per sample, in order of the sample ids; what identifies it, such as a file's name or hash.

    Returns:
        64 hexadecimal digits.
    """
    digest = sha256()
    for item in items:
        data = item.encode() if isinstance(item, str) else item
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@dataclass
class Storage:
    """The tensors of a memory; `ntpseg.ops.record` describes them.

    Attributes:
        rows: ``[2, N, 3, n]`` int32.
        stamp: ``[2, N]`` int32.
        folder: where a mapped memory lies; None for the other kinds.
    """

    rows: Tensor
    stamp: Tensor
    folder: Path | None = None
    _maps: tuple[np.memmap, ...] = ()

    def flush(self) -> None:
        """Write what is mapped to the disk and wait for it; nothing for the other kinds."""
        for mapped in self._maps:
            mapped.flush()


def in_memory(num_samples: int, n: int, device: torch.device, pinned: bool) -> Storage:
    """Allocate rows on a device, or in host memory that a GPU can copy from directly.

    Args:
        pinned: lock the pages of host memory; has no effect without CUDA, where nothing gains by it.
    """
    pin = pinned and torch.cuda.is_available()
    rows, stamp = (
        torch.zeros(shape, dtype=torch.int32, device=device, pin_memory=pin)
        for shape in ((2, num_samples, 3, n), (2, num_samples))
    )
    return Storage(rows, stamp)


def mapped(folder: Path, num_samples: int, n: int, *, new: bool = True) -> Storage:
    """Map the memory's files; new ones are sparse and take no room yet.

    Args:
        folder: where they are; created if absent.
        num_samples: N.
        n: entries of a sample.
        new: make the files. If False they are there already, of the right size.

    Raises:
        ValueError: a file of a memory that is not new is missing or of another size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = (("rows", (2, num_samples, 3, n)), ("stamp", (2, num_samples)))
    maps = tuple(_map(folder / name, shape, new) for name, shape in shapes)
    rows, stamp = (torch.from_numpy(array) for array in maps)
    return Storage(rows, stamp, folder, maps)


def read_header(folder: Path) -> dict[str, Any] | None:
    """Return the header of a mapped memory, or None where there is none."""
    header = folder / "header.json"
    try:
        return json.loads(header.read_text(encoding="utf-8")) if header.exists() else None
    except ValueError as error:
        raise ValueError(f"{header} must be JSON, got a damaged file ({error}); remove {folder}") from error


def write_header(folder: Path, fields: dict[str, Any]) -> None:
    """Replace the header of a mapped memory as a whole."""
    write_json(folder / "header.json", fields)


def _map(path: Path, shape: tuple[int, ...], new: bool) -> np.memmap:
    size = int(np.prod(shape)) * 4
    actual = path.stat().st_size if path.is_file() else 0
    # Made longer, a file that was cut off would hold zeros: position 0, token 0.
    if not new and actual != size:
        raise ValueError(f"{path} must have {size} bytes, got {actual}; remove {path.parent} to begin anew")
    with path.open("ab") as file:
        os.truncate(file.fileno(), size)
    return np.memmap(path, dtype=np.int32, mode="r+", shape=shape)
