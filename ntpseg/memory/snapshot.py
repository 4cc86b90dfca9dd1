"""A mapped memory on the disk, written as what changed since it was last saved.

``NAME.pt`` names the parts that make up the memory, ``NAME-RUN-NUMBER.pt`` beside it, each some rows of one epoch.
Later parts may hold rows of earlier ones again: entries only ever join a row, so merging all parts in any order gives
what was saved. Parts are never changed; the next save links them.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ntpseg.memory import state
from ntpseg.memory.changes import UNSAVED, changed, unmark
from ntpseg.memory.storage import Storage
from ntpseg.utils.checks import brief
from ntpseg.utils.files import atomic_open

_PART_BYTES = 64 << 20
# So many saves after one of everything, all is written again: reading a checkpoint should not take thousands of files.
_INCREMENTS = 64


class UnreadableFile(ValueError):
    """A file of a saved memory is missing or damaged; the message names it."""


class Snapshots:
    """What a mapped memory has saved where.

    Args:
        storage: its rows; no other thread may write them while `save` runs.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._run = uuid.uuid4().hex[:12]
        self._number, self._increments = 0, 0
        self._parts: list[dict[str, Any]] = []
        self._folder: Path | None = None

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write or link all parts, and then ``path``.

        Args:
            path: file to write.
            identity: of the memory, its epoch included.
        """
        epochs = [epoch for epoch in (identity["epoch"] - 1, identity["epoch"]) if epoch > 0]
        parts = [part for part in self._parts if part["epoch"] in epochs]
        whole = self._increments >= _INCREMENTS or not self._link(parts, path.parent)
        if whole:
            parts, self._increments = [], 0
        n = self._storage.rows.shape[3]
        # Until everything is there: what could not be written has lost its flag, and the next save writes all.
        self._folder = None
        for epoch in epochs:
            for sample in changed(self._storage, epoch, None if whole else UNSAVED, max(1, _PART_BYTES // (12 * n))):
                name = f"{path.stem}-{self._run}-{self._number:06d}.pt"
                self._number += 1
                count, entry = state.compact(self._storage.rows[epoch % 2][sample])
                self._storage.touch(sample.numel())
                write(path.with_name(name), state.columns(sample, count, entry))
                parts.append({"name": name, "epoch": epoch})
                unmark(self._storage, epoch, sample, UNSAVED)
        write(path, {**identity, "parts": parts})
        self._parts, self._folder, self._increments = parts, path.parent, self._increments + 1

    def _link(self, parts: list[dict[str, Any]], folder: Path) -> bool:
        """Whether all parts of the last save are in `folder` now; links those of them that are not."""
        if self._folder is None:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            source, target = self._folder / part["name"], folder / part["name"]
            if target.exists():
                continue
            if not source.is_file():
                return False
            try:
                os.link(source, target)
            except OSError:
                # A file system without links, or another one.
                with atomic_open(target) as copy, source.open("rb") as original:
                    shutil.copyfileobj(original, copy, 1 << 20)
        return True


def write(path: Path, saved: dict[str, Any]) -> None:
    """Write tensors, numbers and strings; the file appears complete or not at all."""
    with atomic_open(path) as file:
        torch.save(saved, file)


def states(path: Path) -> Iterator[dict[str, Any]]:
    """What `HardTokenMemory.save` wrote, as states the first of which is to be loaded and the others merged.

    Tensors of parts are mapped from the files, so that reading them takes no memory for their size.

    Raises:
        ValueError: a file cannot be read, or is none of a hard-token memory.
    """
    saved = _read(path, mapped=False)
    if not isinstance(saved, dict) or "parts" not in saved:
        yield saved
        return
    nothing = state.columns(torch.empty(0).long(), torch.empty(0).int(), torch.empty(0, 3).int())
    parts = saved.pop("parts")
    epoch = state.check_epoch(saved.get("epoch"))
    yield {**saved, "served": nothing, "recording": nothing}
    for part in parts if isinstance(parts, list) else [parts]:
        name, current = (part.get("name"), part.get("epoch")) if isinstance(part, dict) else (None, None)
        if not isinstance(name, str) or Path(name).name != name or current not in (epoch - 1, epoch):
            raise ValueError(f"{path} must name files of epochs {epoch - 1} and {epoch} beside it, got {brief(part)}")
        served, entries = current == epoch - 1, _read(path.with_name(name), mapped=True)
        yield {**saved, "served": entries if served else nothing, "recording": nothing if served else entries}


def _read(path: Path, *, mapped: bool) -> Any:
    with suppress(Exception):  # a damaged file can raise anything
        return torch.load(str(path), weights_only=True, mmap=mapped)
    raise UnreadableFile(f"{path} must hold a hard-token memory, got a file that cannot be read")
