"""Interleaved timing: every round runs every provider once, so that other load falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20  # several times the largest L2 cache there is
_HEAD_START_CYCLES = 1_000_000  # about half a millisecond


@dataclass(frozen=True)
class Budget:
    """How long one comparison is timed.

    Attributes:
        seconds: of all rounds together.
        min_rounds, max_rounds: bounds on the number of rounds, whatever they take.
        warmup: rounds before the first that counts.
    """

    seconds: float
    min_rounds: int
    max_rounds: int
    warmup: int = 2


class Clock:
    """Times calls on one device; on CUDA by events, read after a whole round, with a cold L2 cache at each start.

    There a call starts behind other work, as it does in a training step, where the host runs ahead: launches count only
    as far as the device waits for them, after a synchronisation for example.

    Args:
        device: of the calls.
        cpu_time: count the process's own processor time, which other jobs on a busy machine disturb less; CPU only.
    """

    def __init__(self, device: torch.device, cpu_time: bool = False) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.read = time.process_time if cpu_time else time.perf_counter
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    @property
    def method(self) -> str:
        """What the rows say about how the time was taken."""
        return self.read.__name__ if self.flush is None else "cuda events, L2 flushed, launches ahead"

    def round(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Seconds of each call, one after another."""
        if self.flush is None:
            seconds = []
            for call in calls:
                start = self.read()
                call()
                seconds.append(self.read() - start)
            return seconds
        events = []
        for call in calls:
            self.flush.zero_()
            torch.cuda._sleep(_HEAD_START_CYCLES)
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def interleaved(calls: dict[str, Callable[[], Any]], clock: Clock, budget: Budget) -> dict[str, list[float]]:
    """Seconds of every call in every round.

    The order turns by one place a round, so that nobody always follows the same neighbour.

    Args:
        calls: at least one, each one step of work.
        clock: of their device.
        budget: rounds go on until its seconds are spent, within its bounds.
    """
    names = list(calls)
    for _ in range(budget.warmup):
        clock.round([calls[name] for name in names])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + budget.seconds
    turn = 0
    while turn < budget.min_rounds or (turn < budget.max_rounds and time.perf_counter() < deadline):
        first = turn % len(names)
        order = names[first:] + names[:first]
        for name, spent in zip(order, clock.round([calls[name] for name in order]), strict=True):
            seconds[name].append(spent)
        turn += 1
    return seconds


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and least value."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p25", "p75", "least"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "p25": low, "p75": high, "least": min(values)}


def ratio_quartiles(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """The same of the ratio within each round."""
    return quartiles([a / b for a, b in zip(values, reference, strict=True)])


def cuda_graph(call: Callable[[], Any], repeats: int) -> Callable[[], Any]:
    """A CUDA graph of `repeats` calls: what many small launches cost without the gaps between them.

    Raises:
        RuntimeError: the call does something that cannot be captured, such as reading a value back.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay
