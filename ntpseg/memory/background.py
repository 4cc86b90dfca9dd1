"""Reading and writing rows in host memory in background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ntpseg.memory.changes import mark_recorded
from ntpseg.memory.storage import Storage
from ntpseg.ops import merge_entries

_WRITES_IN_FLIGHT = 16
_READS_AHEAD = 8


class Background:
    """One thread that merges what was recorded and one that fetches what will be looked up.

    They never meet: an epoch writes one buffer and reads the other. Before the buffers change roles, `drain` must have
    returned.

    Args:
        storage: rows in host memory.
        control: as in `ntpseg.ops.record_errors`, on the CPU.
        epoch: scalar int64 tensor on the CPU.
        device: where the recorded entries come from and the fetched ones go to.
    """

    def __init__(self, storage: Storage, control: Tensor, epoch: Tensor, device: torch.device) -> None:
        self._storage, self._control, self._epoch, self._device = storage, control, epoch, device
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ntpseg-memory-writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ntpseg-memory-reader")
        self._writes: deque[Future[None]] = deque()
        self._reads: deque[tuple[Tensor, Future[Tensor]]] = deque()

    def write(self, sample_ids: Tensor, entries: Tensor) -> None:
        """Merge ``entries [B, 3, m]`` int32 into the rows of ``sample_ids [B]`` later; waits only if far behind.

        Raises:
            Exception: whatever an earlier write raised.
        """
        while self._writes and (self._writes[0].done() or len(self._writes) >= _WRITES_IN_FLIGHT):
            self._writes.popleft().result()
        ready = None
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(entries.device)  # the copies', whatever the current device is
            sample_ids, entries = (self._to_host(x) for x in (sample_ids, entries))
            ready = torch.cuda.Event()
            ready.record(stream)
        self._writes.append(self._writer.submit(self._merge, sample_ids, entries, ready))

    def prefetch(self, sample_ids: Tensor) -> None:
        """Start fetching the rows that a later `read` of the same ids will want; the oldest is dropped beyond 8."""
        ids = sample_ids.cpu().clone()
        self._reads.append((ids, self._reader.submit(self._gather, ids)))
        if len(self._reads) > _READS_AHEAD:
            self._reads.popleft()[1].cancel()

    def read(self, sample_ids: Tensor) -> Tensor:
        """Return ``[B, 3, n]`` int32 of the epoch being served, on the device, -1 in position and token where empty."""
        ids = sample_ids.cpu()
        for slot, (fetched, future) in enumerate(self._reads):
            if torch.equal(fetched, ids):
                del self._reads[slot]
                return future.result().to(self._device, non_blocking=True)
        return self._gather(ids).to(self._device, non_blocking=True)

    def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """What ``work`` returns when the writer, after all writes so far, has called it; for other threads to call."""
        return self._writer.submit(work, *args).result()

    def drain(self) -> None:
        """Wait for all writes and forget all reads; the buffers may change roles then."""
        while self._writes:
            self._writes.popleft().result()
        while self._reads:
            future = self._reads.popleft()[1]
            if not future.cancel():
                future.exception()

    def _merge(self, sample_ids: Tensor, entries: Tensor, ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            ready.synchronize()
        mark_recorded(self._storage, self._epoch, sample_ids)
        merge_entries(self._storage.rows, self._storage.stamp, self._control, self._epoch, sample_ids, entries)
        self._storage.touch(sample_ids.numel(), written=True)

    def _gather(self, sample_ids: Tensor) -> Tensor:
        entries = self._served(sample_ids)
        return entries.pin_memory() if self._device.type == "cuda" else entries

    def _served(self, sample_ids: Tensor) -> Tensor:
        """What `served_rows` returns; rows that have nothing to serve are not even read from the disk."""
        rows, stamp = self._storage.rows, self._storage.stamp
        entries = rows.new_full((sample_ids.numel(), *rows.shape[2:]), -1)
        served = int(self._epoch) - 1
        if served > 0:
            known = ((sample_ids >= 0) & (sample_ids < stamp.shape[1])).nonzero().squeeze(1)
            known = known[stamp[served % 2][sample_ids[known]] == served]
            entries[known] = rows[served % 2][sample_ids[known]]
            self._storage.touch(known.numel())
        return entries

    @staticmethod
    def _to_host(tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def served_rows(storage: Storage, epoch: Tensor, sample_ids: Tensor) -> Tensor:
    """Gather the rows that the epoch before ``epoch`` recorded for these samples.

    Args:
        storage: rows on the same device as the other arguments.
        epoch: scalar int64, the epoch being recorded.
        sample_ids: ``[B]`` int64; ids out of range are served empty rows.

    Returns:
        ``[B, 3, n]`` int32, all -1 for a sample that the previous epoch did not visit.
    """
    samples, n = storage.rows.shape[1], storage.rows.shape[3]
    served = epoch - 1
    known = (sample_ids >= 0) & (sample_ids < samples)
    row = (served % 2) * samples + torch.where(known, sample_ids, 0)
    valid = known & (served > 0) & (storage.stamp.view(-1)[row] == served)
    return torch.where(valid.view(-1, 1, 1), storage.rows.view(-1, 3, n)[row], -1)
