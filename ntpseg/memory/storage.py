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


def mapped(folder: Path, num_samples: int, n: int) -> Storage:
    """Map the memory's files, making those that do not exist; new ones are sparse and take no room yet."""
    folder.mkdir(parents=True, exist_ok=True)
    maps = tuple(
        _map(folder / name, shape) for name, shape in (("rows", (2, num_samples, 3, n)), ("stamp", (2, num_samples)))
    )
    rows, stamp = (torch.from_numpy(array) for array in maps)
    return Storage(rows, stamp, folder, maps)


def read_header(folder: Path) -> dict[str, Any] | None:
    """Return the header of a mapped memory, or None where there is none."""
    header = folder / "header.json"
    return json.loads(header.read_text()) if header.exists() else None


def write_header(folder: Path, fields: dict[str, Any]) -> None:
    """Replace the header of a mapped memory as a whole."""
    write_json(folder / "header.json", fields)


def _map(path: Path, shape: tuple[int, ...]) -> np.memmap:
    size = int(np.prod(shape)) * 4
    with path.open("ab") as file:
        os.truncate(file.fileno(), size)
    return np.memmap(path, dtype=np.int32, mode="r+", shape=shape)
