"""How quick training is: step time, tokens, FLOP/s and their share of the device's rate, memory, waiting for data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ntpseg.models.flops import TrainingFlops
from ntpseg.utils.flop_rate import matmul_flops
from ntpseg.utils.ranges import part

_GIB = 2**30
# Console names and formats of the logged figures.
_SHOWN = {
    "step_seconds": ("s/step", "{:.3g}"),
    "tokens_per_second": ("tok/s", "{:.4g}"),
    "supervised_tokens_per_second": ("sup. tok/s", "{:.4g}"),
    "flops_per_second": ("FLOP/s", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_memory_gib": ("GiB", "{:.3g}"),
    "data_wait_share": ("data wait", "{:.1%}"),
    "padding_share": ("padding", "{:.1%}"),
    "het_sent_mb": ("HET MB sent", "{:.3g}"),
}


class Throughput:
    """Figures of the steps since the last log, of all ranks together.

    The clock is read where training has just waited for the device anyway (a log reads the loss), so measuring adds no
    synchronisation; evaluation and checkpoints do not count. A resumed run counts its own steps alone.

    Args:
        heads: k, the number of supervised row counts.
        device: where batches are counted.
        world_size: the number of ranks.

    Attributes:
        now: the clock, seconds; benchmarks on a busy machine take the process's own time instead of the wall's.
    """

    def __init__(self, heads: int, device: torch.device, world_size: int = 1) -> None:
        self.heads, self.device, self.world_size = heads, device, world_size
        self.now: Callable[[], float] = time.perf_counter
        self.flops: TrainingFlops | None = None
        self.peak: float | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything; the clock starts with the next batch that is asked for."""
        self._counts: Tensor | None = None
        self._steps, self._waited, self._paused = 0, 0.0, 0.0
        self._started: float | None = None

    def prepare(self, model: Any, dtype: torch.dtype, *, first: bool = True) -> None:
        """Work out the operations of a step and, on the first rank, measure the rate of the device.

        Args:
            model: an `NTPSegModel`.
            dtype: that products are computed in.
            first: this is rank 0, whose logs are kept.
        """
        self.flops = TrainingFlops.of(model)
        if not first:
            return
        try:
            self.peak = matmul_flops(self.device, dtype)
        except RuntimeError:  # no room on the device, or no products in this dtype: then there is no utilisation
            self.peak = None
        if self.device.type == "cuda":
            # The operands of that product are none of training's memory.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def batches(self, source: Iterator[Any]) -> Iterator[Any]:
        """The same batches; what each takes to come is waiting for data."""
        if self._started is None:
            self._started = self.now()
        while True:
            start = self.now()
            try:
                with part("load"):
                    batch = next(source)
            except StopIteration:
                return
            finally:
                self._waited += self.now() - start
            yield batch

    def add(self, counts: Tensor) -> None:
        """Add one step's float64 ``[k + 4]``, all ranks' rows of each head, tokens, squares, places and sequences."""
        self._counts = counts if self._counts is None else self._counts + counts

    def step(self) -> None:
        """One step is done."""
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A block that is no part of training: an evaluation, a checkpoint."""
        start, running = self.now(), self._started is not None
        try:
            with part("evaluation, checkpoints"):
                yield
        finally:
            if running:
                self._paused += self.now() - start

    def pop(self) -> dict[str, float]:
        """The figures since the last call; all ranks must call it alike, right after the device was waited for."""
        now, counts, steps = self.now(), self._counts, self._steps
        seconds = now - self._started - self._paused if self._started is not None else 0.0
        waited = self._waited
        self.reset()
        self._started = now
        if counts is None or not steps or seconds <= 0:
            return {}
        # The slowest rank holds up all others, and the fullest is the first to run out of memory.
        worst = torch.tensor([waited, peak_memory(self.device)], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        waited, memory = worst.tolist()
        *rows, tokens, squares, places, images = counts.tolist()
        figures = {
            "step_seconds": seconds / steps,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": rows[0] / seconds,
        }
        if self.flops is not None:
            rate = self.flops.step(tokens=tokens, squares=squares, rows=rows, images=images) / seconds
            figures["flops_per_second"] = rate
            if self.peak:
                figures["mfu"] = rate / (self.peak * self.world_size)
        if memory > 0:
            figures["peak_memory_gib"] = memory / _GIB
        figures["data_wait_share"] = min(waited / seconds, 1.0)
        figures["padding_share"] = 1.0 - tokens / max(places, 1.0)
        return figures


def count_batch(batch: Mapping[str, Any], pad: int, device: torch.device) -> Tensor:
    """Float64 ``[4]``: tokens, the sum of squared sequence lengths, places, sequences.

    Padding is no token, nor is a sample that only fills up a rank's batch (a negative id). A position that starts
    again begins another sequence of a packed row.

    Args:
        batch: ``input_ids`` ``[B, T]``, ``sample_ids`` ``[B]``; ``position_ids`` and ``attention_mask`` where it has
            them, and ``packing`` with the ``source`` ``[R, L]`` of packed rows, whose places then count.
        pad: id of padding.
        device: of the result.
    """
    ids = batch["input_ids"].to(device)
    mask = batch.get("attention_mask")
    real = ids != pad if mask is None or mask.dim() != 2 else mask.to(device) != 0
    kept = (batch["sample_ids"].to(device) >= 0).view(-1, 1) if "sample_ids" in batch else None
    if kept is not None and len(kept) == len(real):
        real = real & kept
    position = batch.get("position_ids")
    if position is None:
        position = torch.arange(ids.shape[1], device=device)
    # Summed over the positions 0 .. n - 1, 2 p + 1 is n squared.
    odd = 2 * position.to(device) + 1
    packing = batch.get("packing")
    places = ids.numel() if packing is None else packing["source"].numel()
    sequences = real.any(1).sum() if batch.get("position_ids") is None else (real & (odd == 1)).sum()
    return torch.stack([real.sum(), (odd * real).sum(), sequences.new_full((), places), sequences]).double()


def peak_memory(device: torch.device) -> int:
    """Peak bytes of the process: of the CUDA allocator, or of the resident set; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # macOS counts bytes, everything else kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shown(logs: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a log line as the console shows them."""
    return {
        name: form.format(logs[key]) for key, (name, form) in _SHOWN.items() if isinstance(logs.get(key), (int, float))
    }
