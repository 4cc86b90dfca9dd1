"""Exchanging what was recorded so far while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ntpseg.memory.background import Background
from ntpseg.memory.exchange import Link, Traffic, agree, alone, merge, rounds, unsent
from ntpseg.memory.storage import Storage


class Overlap:
    """One thread that sends and receives rows of the epoch being recorded, which nobody reads before the next one.

    Its collectives run in a gloo group of its own, so that they never meet those of the training steps. Rows in host
    memory are read and merged by the background's writer, between its own merges, so that no row is sent half-written.
    For rows on the device both are done by the caller's thread, in the order of its stream: read by `begin`, merged by
    `finish`.

    Args:
        storage: the rows.
        control: as in `ntpseg.ops.record_errors`.
        background: of a memory in host memory; None for one on the device.
        traffic: counts.
    """

    def __init__(self, storage: Storage, control: Tensor, background: Background | None, traffic: Traffic) -> None:
        self._storage, self._control, self._background, self._traffic = storage, control, background, traffic
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._received: list[tuple[int, Tensor, Tensor]] = []
        self._groups: dict[Any, Any] = {}

    def begin(self, epoch: int, group: Any) -> None:
        """Start sending what changed; an exchange that is under way is finished first.

        Every rank of the group must call it at the same place among its collectives.

        Raises:
            Exception: whatever the exchange before raised.
        """
        self.finish()
        if alone(group):
            return
        if group not in self._groups:
            ranks = None if group is None else dist.get_process_group_ranks(group)
            self._groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=group is not None)
        link = Link(self._groups[group], self._traffic)
        parts = unsent(self._storage, epoch, link.world_size)
        if self._background is None:
            parts = iter(list(parts))
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ntpseg-memory-exchange")
        self._pending = self._thread.submit(self._exchange, parts, epoch, link)

    def finish(self) -> None:
        """Wait for the exchange that is under way; what it received is in the memory then.

        Raises:
            ValueError: the ranks are in different epochs.
            Exception: what a collective call raised.
        """
        if self._pending is None:
            return
        start, pending, self._pending = time.perf_counter(), self._pending, None
        try:
            pending.result()
            for received in self._received:
                merge(self._storage, self._control, *received)
        finally:
            self._received.clear()
            self._traffic.seconds_waited += time.perf_counter() - start

    def _exchange(self, parts: Iterator[tuple[Tensor, Tensor]], epoch: int, link: Link) -> None:
        agree(link, epoch)
        if self._background is None:
            rounds(parts, lambda *received: self._received.append(received), epoch, link)
            return
        run = self._background.run
        rounds(_each(run, parts), lambda *received: run(merge, self._storage, self._control, *received), epoch, link)


def _each(run: Callable[..., Any], parts: Iterator[Any]) -> Iterator[Any]:
    while (part := run(partial(next, parts, None))) is not None:
        yield part
