"""Merging hard-token memories over the ranks of a process group: only what changed travels, and it is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ntpseg.memory import state
from ntpseg.memory.changes import UNSENT, changed, mark, mark_merged, unmark
from ntpseg.memory.storage import Storage
from ntpseg.ops import merge_entries

_BYTES_PER_ROUND = 1 << 28
_COMPARED = 1 << 14  # rows whose hashes are worked out at once


@dataclass
class Traffic:
    """What the exchanges of a memory cost this rank so far.

    Attributes:
        rounds: collective calls that carried rows.
        rows_sent, rows_received: rows of samples.
        payload_bytes: of the rows sent, once.
        bytes_sent: what this rank put on the wire, padding and counts included; it receives as much. A ring passes
            each rank's part on to all others: ``(W - 1) x`` the longest part of W ranks.
        compared_bytes: the part of ``bytes_sent`` that compared rows after a memory was loaded.
        seconds: in collective calls, most of them beside the training thread if exchanges are overlapped.
        seconds_waited: by the thread that called `HardTokenMemory.sync` and what else waits for an exchange.
    """

    rounds: int = 0
    rows_sent: int = 0
    rows_received: int = 0
    payload_bytes: int = 0
    bytes_sent: int = 0
    compared_bytes: int = 0
    seconds: float = 0.0
    seconds_waited: float = 0.0


class Link:
    """The collectives of an exchange, timed and counted.

    Args:
        group: process group; the default one if None.
        traffic: counts.
    """

    def __init__(self, group: Any, traffic: Traffic) -> None:
        self.group, self.traffic = group, traffic
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        nccl = "nccl" in dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``[W, *shape]`` on the CPU of one tensor of each rank, alike in shape."""
        start = time.perf_counter()
        mine = tensor.to(self.device)
        gathered = mine.new_empty(self.world_size, *mine.shape)
        dist.all_gather(list(gathered), mine, self.group)
        result = gathered.cpu()
        self._count(mine, start)
        return result

    def all_reduce_min(self, tensor: Tensor) -> Tensor:
        """The smallest of each element over the ranks, on the CPU."""
        start = time.perf_counter()
        mine = tensor.to(self.device)
        dist.all_reduce(mine, dist.ReduceOp.MIN, self.group)
        result = mine.cpu()
        # A ring reduces and then gathers a W-th of the tensor W - 1 times each.
        size = 2 * (self.world_size - 1) * mine.nbytes // self.world_size
        self.traffic.bytes_sent += size
        self.traffic.compared_bytes += size
        self.traffic.seconds += time.perf_counter() - start
        return result

    def _count(self, tensor: Tensor, start: float) -> None:
        self.traffic.bytes_sent += (self.world_size - 1) * tensor.nbytes
        self.traffic.seconds += time.perf_counter() - start


def alone(group: Any = None) -> bool:
    """Whether there is no rank to exchange with."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1


def exchange(storage: Storage, control: Tensor, epoch: int, group: Any, traffic: Traffic) -> None:
    """Bring both buffers to the union of what all ranks hold, in place.

    Only rows that a rank recorded since it last sent them travel, without their empty slots, in rounds of bounded size.
    After a memory was loaded or opened on any rank, hashes of all rows are compared first, and those rows travel that
    are not the same on all ranks. Merging is commutative, so all ranks end with the same rows and those are the ones
    that a single process would hold.

    Args:
        storage: the rows; no other thread may write them meanwhile.
        control: as in `ntpseg.ops.record_errors`.
        epoch: the epoch being recorded, the same on all ranks.
        group: process group; the default one if None.
        traffic: counts.

    Raises:
        ValueError: the ranks are not in the same epoch.
    """
    if alone(group):
        return
    link = Link(group, traffic)
    strange = agree(link, epoch, storage.strange)
    for current in (epoch - 1, epoch):
        if current > 0:
            if strange:
                _find_differing(storage, current, link)
            rounds(unsent(storage, current, link.world_size), partial(merge, storage, control), current, link)
    storage.strange = False


def agree(link: Link, epoch: int, strange: bool = False) -> bool:
    """Whether a memory of any rank is strange to the others; raises a `ValueError` unless all are in one epoch."""
    told = link.all_gather(torch.tensor([epoch, strange]))
    first, last = int(told[:, 0].min()), int(told[:, 0].max())
    if first != last:
        raise ValueError(f"all ranks must be in the same epoch, got {first} .. {last}: each must call advance alike")
    return bool(told[:, 1].any())


def unsent(storage: Storage, epoch: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples ``[S]`` int64 and rows ``[S, 3, n]`` int32, on the CPU, that are to be sent; they count as sent then."""
    n = storage.rows.shape[3]
    for sample in changed(storage, epoch, UNSENT, max(1, _BYTES_PER_ROUND // (world_size * 12 * (n + 1)))):
        unmark(storage, epoch, sample, UNSENT)
        block = storage.rows[epoch % 2][sample].cpu()
        storage.touch(sample.numel())
        yield sample.cpu(), block


def rounds(
    parts: Iterator[tuple[Tensor, Tensor]], take: Callable[[int, Tensor, Tensor], None], epoch: int, link: Link
) -> None:
    """Send all parts of all ranks, and give those of the others to ``take(epoch, samples, rows)``.

    Args:
        parts: see `unsent`.
        take: called in this thread.
        epoch: of the rows.
        link: to the other ranks, which must all be here.
    """
    while True:
        part = next(parts, None)
        sample, block = part if part is not None else (torch.empty(0, dtype=torch.int64), torch.empty(0, 3, 0).int())
        n = block.shape[2]
        count, entry = state.compact(block)
        sizes = link.all_gather(torch.tensor([sample.numel(), entry.shape[0], n])).tolist()
        longest = max(12 * (samples + entries) for samples, entries, _ in sizes)
        if not longest:
            return
        received = link.all_gather(_message(sample, count, entry, longest))
        traffic = link.traffic
        traffic.rounds += 1
        traffic.rows_sent += sample.numel()
        traffic.payload_bytes += 12 * (sample.numel() + entry.shape[0])
        for rank, (samples, entries, width) in enumerate(sizes):
            if rank == link.rank or not samples:
                continue
            mine = received[rank, : 12 * (samples + entries)]
            # Copied, since 8 bytes at a time must lie at a multiple of 8; the entries, most of it, are used in place.
            ids = mine[: 8 * samples].clone().view(torch.int64)
            counts = mine[8 * samples : 12 * samples].view(torch.int32)
            entry = mine[12 * samples :].view(torch.int32).view(-1, 3)
            traffic.rows_received += samples
            take(epoch, ids, state.expand(counts, entry, width))


def _message(sample: Tensor, count: Tensor, entry: Tensor, size: int) -> Tensor:
    """``[size]`` uint8 of the sample ids, counts and entries one after another, and zeros."""
    message, start = torch.empty(size, dtype=torch.uint8), 0
    for tensor in (sample, count, entry):
        part = message[start : start + tensor.nbytes]
        part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += tensor.nbytes
    message[start:] = 0
    return message


def merge(storage: Storage, control: Tensor, epoch: int, sample_ids: Tensor, block: Tensor) -> None:
    """Merge rows of another rank ``[S, 3, n]`` into those of ``epoch``."""
    device = storage.rows.device
    current, sample_ids = torch.tensor(epoch, device=device), sample_ids.to(device)
    mark_merged(storage, current, sample_ids)
    merge_entries(storage.rows, storage.stamp, control, current, sample_ids, block.contiguous().to(device))
    storage.touch(sample_ids.numel(), written=True)


def _find_differing(storage: Storage, epoch: int, link: Link) -> None:
    """Flag those rows of an epoch as unsent that are not the same on all ranks."""
    buffer, samples = epoch % 2, storage.stamp.shape[1]
    for start in range(0, samples, _COMPARED):
        block = slice(start, min(start + _COMPARED, samples))
        held = (storage.stamp[buffer, block] == epoch).nonzero().squeeze(1)
        hashes = torch.zeros(block.stop - block.start, dtype=torch.int64)
        if held.numel():
            hashes[held.cpu()] = row_hash(storage.rows[buffer][held + start]).cpu()
            storage.touch(held.numel())
        least, most = link.all_reduce_min(torch.stack([hashes, ~hashes]))
        differing = held[(least != ~most)[held.cpu()].to(held.device)]
        if differing.numel():
            mark(storage, epoch, differing + start, UNSENT)


def row_hash(block: Tensor) -> Tensor:
    """A 64-bit hash, never 0, of each of the rows ``[S, 3, n]`` int32; the same on every device."""
    words = block.flatten(1).long()
    words = words + torch.arange(1, words.shape[1] + 1, device=block.device) * 0x1E3779B97F4A7C15
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        words = (words ^ (words >> 31)) * factor
    return (words ^ (words >> 29)).sum(1) | 1
