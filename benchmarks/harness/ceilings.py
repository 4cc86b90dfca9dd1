"""The two rates that bound everything on a device, measured there: matrix products and copies."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.harness.timing import Budget, Clock, interleaved


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the figure that training logs divide by (`ntpseg.utils.flop_rate`)."""
    # with --base, workers import this beside a revision of the package that may lack the module; they never ask
    from ntpseg.utils import flop_rate

    return flop_rate.matmul_flops(device, dtype)


@functools.cache
def copy_bytes(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written bytes both counted."""
    size = (2 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    rounds = 10 if time.perf_counter() - start < 1 else 3
    times = interleaved({"call": call}, Clock(device), Budget(seconds=0.3, min_rounds=rounds, max_rounds=50))["call"]
    return statistics.median(times) if device.type == "cuda" else min(times)
