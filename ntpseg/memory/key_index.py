"""From content keys to sample ids for data sets whose keys no process can hold: a hash table in mapped files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntpseg.utils.checks import check_integer
from ntpseg.utils.files import write_json

_SLOTS_PER_KEY = 2
_BLOCK = 1 << 22  # slots that are looked through at once
_HEADER = "keys.json"


def sample_keys(items: Sequence[str | bytes]) -> np.ndarray:
    """``[B, 2]`` uint64 keys of samples: the first 128 bits of the SHA-256 of what identifies each.

    Two of 10^8 samples share a key with a probability of 1.5e-23.

    Args:
        items: such as a file's name or hash; a str counts as UTF-8.
    """
    digests = (sha256(item.encode() if isinstance(item, str) else item).digest()[:16] for item in items)
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


class KeyIndex:
    """Sample ids 0 .. N-1 by content key, N growing as `add` is called.

    Open addressing with linear probing, at most half full: 16 bytes of key and 8 of slots (16 from 2^32 - 1 samples
    on) per sample of ``capacity``, in sparse files of which only what is looked at is resident. Batches are looked up
    without a loop over their samples.

    Args:
        folder: of the files. One that is there already is opened as it was flushed last: what a process that ended
            before its `flush` left behind is taken back, so no other process may be adding to it.
        capacity: the most keys; needed for a new one, that of the folder otherwise.

    Raises:
        ValueError: a new index without a capacity, or the folder holds another index, or a damaged one.
    """

    def __init__(self, folder: str | Path, capacity: int | None = None) -> None:
        self._folder = Path(folder)
        header = _read_header(self._folder / _HEADER)
        if header is None:
            check_integer("capacity", capacity, 1)
            header = {"format": "ntpseg.key_index", "capacity": capacity, "size": 0}
        if capacity not in (None, header["capacity"]):
            raise ValueError(f"capacity must be {header['capacity']} as in {self._folder}, got {capacity}")
        self.capacity, self._size = header["capacity"], header["size"]
        slot = np.dtype("<u4" if self.capacity < 2**32 - 1 else "<u8")
        self._folder.mkdir(parents=True, exist_ok=True)
        new = not (self._folder / _HEADER).exists()
        self._keys = _map(self._folder / "keys", np.dtype("<u8"), (self.capacity, 2), new)
        # One more than an id, 0 where there is none.
        self._slots = _map(self._folder / "slots", slot, (_SLOTS_PER_KEY * self.capacity,), new)
        if new:
            self.flush()
        else:
            self._clear_unflushed()

    def __len__(self) -> int:
        """N, the number of keys."""
        return self._size

    def add(self, keys: np.ndarray) -> Tensor:
        """Give the next ids to new keys.

        Args:
            keys: ``[B, 2]`` uint64, see `sample_keys`.

        Returns:
            ``[B]`` int64 ids.

        Raises:
            ValueError: a key is there already or twice among these, or the index is full; nothing is added then.
        """
        keys = _checked(keys)
        if self._size + len(keys) > self.capacity:
            raise ValueError(f"keys must be at most {self.capacity} together, got {self._size + len(keys)}")
        known = self.ids(keys).numpy()
        order = np.lexsort(keys.T)
        twice = (keys[order][1:] == keys[order][:-1]).all(axis=1).nonzero()[0]
        if (known >= 0).any() or len(twice):
            at = int((known >= 0).argmax()) if (known >= 0).any() else int(order[twice[0] + 1])
            first = int(known[at]) if known[at] >= 0 else self._size + int(order[twice[0]])
            raise ValueError(f"keys must be different, got that of sample {self._size + at} for sample {first} too")
        ids = np.arange(self._size, self._size + len(keys))
        self._keys[self._size : self._size + len(keys)] = keys
        slot, open_ = self._start(keys), np.arange(len(keys))
        while len(open_):
            free = open_[self._slots[slot[open_]] == 0]
            self._slots[slot[free]] = ids[free] + 1
            # Of several that chose one slot the last has it; the others, as those who found it taken, go on.
            open_ = open_[self._slots[slot[open_]] != (ids[open_] + 1).astype(self._slots.dtype)]
            slot[open_] = (slot[open_] + 1) % len(self._slots)
        self._size += len(keys)
        return torch.from_numpy(ids)

    def ids(self, keys: np.ndarray) -> Tensor:
        """``[B]`` int64 ids of keys ``[B, 2]`` uint64, -1 for those that were never added."""
        keys = _checked(keys)
        result = np.full(len(keys), -1, dtype=np.int64)
        slot, open_ = self._start(keys), np.arange(len(keys))
        while len(open_):
            held = self._slots[slot[open_]].astype(np.int64) - 1
            open_, held = open_[held >= 0], held[held >= 0]
            same = (self._keys[held] == keys[open_]).all(axis=1)
            result[open_[same]] = held[same]
            open_ = open_[~same]
            slot[open_] = (slot[open_] + 1) % len(self._slots)
        return torch.from_numpy(result)

    def keys(self, ids: Tensor) -> np.ndarray:
        """``[B, 2]`` uint64 keys of ids ``[B]`` int64, each below N."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self._size:
            raise ValueError(f"ids must be in [0, {self._size}), got {int(ids.min())} .. {int(ids.max())}")
        return np.asarray(self._keys[ids.numpy()])

    def flush(self) -> None:
        """Write the index to the disk; what was added after the last flush is not there when it is opened again."""
        self._keys.flush()
        self._slots.flush()
        header = {"format": "ntpseg.key_index", "capacity": self.capacity, "size": self._size}
        write_json(self._folder / _HEADER, header)

    def _clear_unflushed(self) -> None:
        """Empty the slots of ids from N on. Those below were in their places before, so no search passes these.

        Left there they would add up over killed processes until no slot is free, and no search ends.
        """
        path, slots = self._folder / "slots", self._slots
        for start in range(0, len(slots), _BLOCK):
            # Read, not mapped: the index has only what is looked up resident.
            block = np.fromfile(path, slots.dtype, min(_BLOCK, len(slots) - start), offset=start * slots.itemsize)
            slots[start + (block > self._size).nonzero()[0]] = 0

    def _start(self, keys: np.ndarray) -> np.ndarray:
        return (keys[:, 0] % np.uint64(len(self._slots))).astype(np.int64)


def build_index(folder: str | Path, parts: Iterable[Sequence[str | bytes]], capacity: int) -> KeyIndex:
    """Index what identifies each sample, in parts of any size, and flush it.

    Args:
        folder: of the index, new or empty.
        parts: see `sample_keys`.
        capacity: the most samples.

    Raises:
        ValueError: as `KeyIndex.add`.
    """
    index = KeyIndex(folder, capacity)
    for part in parts:
        index.add(sample_keys(part))
    index.flush()
    return index


def renumber(saved: dict[str, Any], old: KeyIndex, new: KeyIndex, key: str | None = None) -> dict[str, Any]:
    """The state of a memory for another data set: errors follow their samples by content key.

    Args:
        saved: what `HardTokenMemory.state_dict` returned, of the data set that ``old`` indexes.
        old: its keys.
        new: keys of the data set that the result is for. Samples that it lacks are left out.
        key: content key of that data set.

    Returns:
        What `HardTokenMemory.load_state_dict` of a memory for ``len(new)`` samples takes.
    """
    result = {**saved, "num_samples": len(new), "key": key}
    for name in ("served", "recording"):
        packed = saved[name]
        ids = new.ids(old.keys(packed["sample"]))
        count = packed["count"].long()
        start = count.cumsum(0) - count
        order = ids.argsort(stable=True)
        order = order[ids[order] >= 0]
        kept = count[order]
        # Entries of a sample lie together: the place of the first, and one further for each.
        first = torch.repeat_interleave(start[order] - (kept.cumsum(0) - kept), kept)
        place = first + torch.arange(len(first))
        columns = {field: packed[field][place] for field in ("deviation", "position", "token")}
        result[name] = {"sample": ids[order], "count": packed["count"][order], **columns}
    return result


def _checked(keys: np.ndarray) -> np.ndarray:
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint64 or keys.ndim != 2 or keys.shape[1] != 2:
        raise ValueError(f"keys must be [B, 2] uint64 as sample_keys returns, got {getattr(keys, 'dtype', type(keys))}")
    return keys


def _read_header(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        capacity, size = int(header["capacity"]), int(header["size"])
        if header["format"] == "ntpseg.key_index" and 0 <= size <= capacity > 0:
            return header
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} must be the header of an index, got another file; remove {path.parent}")


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...], new: bool) -> np.memmap:
    size = math.prod(shape) * dtype.itemsize
    actual = path.stat().st_size if path.is_file() else 0
    if not new and actual != size:
        raise ValueError(f"{path} must have {size} bytes, got {actual}; remove {path.parent} to index anew")
    if new:
        with path.open("wb") as file:
            file.truncate(size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
