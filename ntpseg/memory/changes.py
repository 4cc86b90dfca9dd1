"""What changed in a memory: which rows other ranks have not been sent, and which no checkpoint holds.

A flag counts only where the row's stamp is the epoch asked for, as the row itself does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ntpseg.memory.storage import Storage

UNSENT, UNSAVED = 1, 2
_BLOCK = 1 << 20


def recorded_flags(storage: Storage) -> int:
    """The flags of a row that this rank recorded; only mapped memories are saved by what changed."""
    return UNSENT if storage.folder is None else UNSENT | UNSAVED


def mark_recorded(storage: Storage, epoch: Tensor, sample_ids: Tensor) -> None:
    """Flag the rows that a batch is about to be recorded in; waits for no device, so that a graph can hold it.

    Args:
        epoch: scalar int64 on the storage's device.
        sample_ids: ``[B]`` int64; ids out of range may flag a row in vain.
    """
    storage.flags.view(-1).index_fill_(0, _places(storage, epoch, sample_ids), recorded_flags(storage))


def mark_merged(storage: Storage, epoch: Tensor, sample_ids: Tensor) -> None:
    """Flag the rows that entries known to other ranks are about to be merged into."""
    places = _places(storage, epoch, sample_ids)
    flags, stamp = storage.flags.view(-1), storage.stamp.view(-1)
    kept = torch.where(stamp[places] == epoch, flags[places], torch.zeros_like(flags[:1]))
    flags[places] = kept | (recorded_flags(storage) & UNSAVED)


def mark(storage: Storage, epoch: int, sample_ids: Tensor, flag: int) -> None:
    """Add a flag to rows of an epoch."""
    storage.flags[epoch % 2, sample_ids] |= flag


def unmark(storage: Storage, epoch: int, sample_ids: Tensor, flag: int) -> None:
    """Take a flag from rows of an epoch."""
    storage.flags[epoch % 2, sample_ids] &= 255 ^ flag


def changed(storage: Storage, epoch: int, flag: int | None, size: int) -> Iterator[Tensor]:
    """Ids of the samples of an epoch whose rows have a flag, ascending, no more than ``size`` at once.

    Holds a block of flags at a time, whatever the number of samples.

    Args:
        flag: `UNSENT` or `UNSAVED`; None: every row of that epoch.
        size: the most ids of a part.
    """
    buffer = epoch % 2
    for start in range(0, storage.stamp.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        if flag is None:
            found = storage.stamp[buffer, block] == epoch
        else:
            flags = storage.flags[buffer, block]
            if not flags.any():
                continue
            found = (flags & flag != 0) & (storage.stamp[buffer, block] == epoch)
        ids = found.nonzero().squeeze(1) + start
        for part in ids.split(size):
            if part.numel():
                yield part


def _places(storage: Storage, epoch: Tensor, sample_ids: Tensor) -> Tensor:
    samples = storage.stamp.shape[1]
    known = (sample_ids >= 0) & (sample_ids < samples)
    return (epoch % 2) * samples + torch.where(known, sample_ids, 0)
