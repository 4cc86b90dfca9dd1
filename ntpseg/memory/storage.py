"""Where the memory's rows lie: on the device, in host memory, or in files mapped into it."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntpseg.utils.files import write_json

KINDS = ("device", "pinned", "mapped")
_FILES = {"rows": torch.int32, "stamp": torch.int32, "flags": torch.uint8}
# Beyond the row itself: a page that is written comes alone, while Linux maps what it has of the 64 KiB around one that
# is read, and counts all of it as resident.
_WRITTEN, _READ = 1 << 12, 1 << 16
_RESIDENT = 1 << 30


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
    """The tensors of a memory; `ntpseg.ops.record` describes the first two.

    Attributes:
        rows: ``[2, N, 3, n]`` int32.
        stamp: ``[2, N]`` int32.
        flags: ``[2, N]`` uint8, what has not been done with a row since it changed (`ntpseg.memory.changes`).
        folder: where a mapped memory lies; None for the other kinds.
        strange: other ranks may lack rows that are not flagged as unsent: the memory was loaded or opened.
    """

    rows: Tensor
    stamp: Tensor
    flags: Tensor
    folder: Path | None = None
    strange: bool = False
    _maps: tuple[mmap.mmap, ...] = ()
    _touched: int = 0

    def flush(self) -> None:
        """Write what is mapped to the disk and wait for it; nothing for the other kinds."""
        for mapped in self._maps:
            mapped.flush()

    def touch(self, rows: int, *, written: bool = False) -> None:
        """Say that so many rows were read, or written, so that not too many mapped pages stay resident."""
        if sum(map(len, self._maps)) > _RESIDENT:
            size = 4 * self.rows.shape[2] * self.rows.shape[3]
            self._touched += rows * (size + (_WRITTEN if written else _READ))
            if self._touched >= _RESIDENT:
                self.release()

    def release(self) -> None:
        """Give up the pages of a mapped memory. The system keeps what was written, and may be reading or writing it."""
        self._touched = 0
        for mapped in self._maps if hasattr(mmap, "MADV_DONTNEED") else ():
            mapped.madvise(mmap.MADV_DONTNEED)

    def clear(self) -> None:
        """Forget all rows; mapped files give their room back. No other thread may be at the memory."""
        if self.folder is None:
            self.stamp.zero_()
            self.flags.zero_()
            return
        for name, mapped in zip(_FILES, self._maps):
            # A file that grows has a hole there, which reads as zeros and takes no room.
            os.truncate(self.folder / name, 0)
            os.truncate(self.folder / name, len(mapped))


def in_memory(num_samples: int, n: int, device: torch.device, pinned: bool) -> Storage:
    """Allocate rows on a device, or in host memory that a GPU can copy from directly.

    Args:
        pinned: lock the pages of host memory; has no effect without CUDA, where nothing gains by it.
    """
    pin = pinned and torch.cuda.is_available()
    rows, stamp, flags = (
        torch.zeros(shape, dtype=dtype, device=device, pin_memory=pin)
        for shape, dtype in zip(_shapes(num_samples, n), _FILES.values())
    )
    return Storage(rows, stamp, flags)


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
    shapes = _shapes(num_samples, n)
    # Flags of a memory that had none before: it is strange to other ranks anyway.
    fresh = {name: new or (name == "flags" and not (folder / name).exists()) for name in _FILES}
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, _FILES.values())]
    maps = tuple(_map(folder / name, size, fresh[name]) for name, size in zip(_FILES, sizes))
    rows, stamp, flags = (
        torch.frombuffer(mapped, dtype=dtype).view(shape) for mapped, dtype, shape in zip(maps, _FILES.values(), shapes)
    )
    return Storage(rows, stamp, flags, folder, not new, maps)


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


def _shapes(num_samples: int, n: int) -> tuple[tuple[int, ...], ...]:
    return (2, num_samples, 3, n), (2, num_samples), (2, num_samples)


def _map(path: Path, size: int, new: bool) -> mmap.mmap:
    actual = path.stat().st_size if path.is_file() else 0
    # Made longer, a file that was cut off would hold zeros: position 0, token 0.
    if not new and actual != size:
        raise ValueError(f"{path} must have {size} bytes, got {actual}; remove {path.parent} to begin anew")
    with path.open("ab") as file:
        os.truncate(file.fileno(), size)
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), size)
    if hasattr(mmap, "MADV_RANDOM"):
        # Samples come in random order: what lies beside a row would be read from the disk in vain.
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped
