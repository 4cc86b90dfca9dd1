"""Merging hard-token memories over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ntpseg.ops import merge_entries

_BYTES_PER_ROUND = 1 << 28


def exchange(rows: Tensor, stamp: Tensor, control: Tensor, epoch: int, group: Any = None) -> None:
    """Bring both buffers to the union of what all ranks hold, in place.

    Only rows that a rank has written travel, in rounds of bounded size. Merging is commutative, so all ranks end with
    the same rows and those are the ones that a single process would hold.

    Args:
        rows: ``[2, N, 3, n]`` int32.
        stamp: ``[2, N]`` int32.
        control: as in `ntpseg.ops.record_errors`.
        epoch: the epoch being recorded, the same on all ranks.
        group: process group; the default one if None.

    Raises:
        ValueError: the ranks are not in the same epoch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    wire = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else "cpu"
    span = torch.tensor([epoch, -epoch], device=wire)
    dist.all_reduce(span, dist.ReduceOp.MAX, group)
    if int(span[0]) != -int(span[1]):
        raise ValueError(
            f"all ranks must be in the same epoch, got {-int(span[1])} .. {int(span[0])}: each must call advance alike"
        )
    for current in (epoch - 1, epoch):
        if current > 0:
            _exchange_epoch(rows, stamp, control, current, wire, group)


def _exchange_epoch(rows: Tensor, stamp: Tensor, control: Tensor, epoch: int, wire: Any, group: Any) -> None:
    world, me, n = dist.get_world_size(group), dist.get_rank(group), rows.shape[3]
    mine = (stamp[epoch % 2] == epoch).nonzero().squeeze(1)
    counts = [torch.zeros(1, dtype=torch.int64, device=wire) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([mine.numel()], device=wire), group)
    totals = [int(count) for count in counts]
    clock = torch.tensor(epoch, device=rows.device)
    chunk = max(1, _BYTES_PER_ROUND // (world * 3 * n * 4))
    for start in range(0, max(totals), chunk):
        size = min(chunk, max(totals) - start)
        sample = torch.full((size,), -1, dtype=torch.int64, device=wire)
        entry = torch.full((size, 3, n), -1, dtype=torch.int32, device=wire)
        sent = mine[start : start + size]
        sample[: sent.numel()] = sent.to(wire)
        # Read from a copy taken before this round's merge: later rounds send other rows, so nothing is sent twice.
        entry[: sent.numel()] = rows[epoch % 2][sent].to(wire)
        samples = [torch.empty_like(sample) for _ in range(world)]
        entries = [torch.empty_like(entry) for _ in range(world)]
        dist.all_gather(samples, sample, group)
        dist.all_gather(entries, entry, group)
        for rank in range(world):
            if rank != me:
                held = samples[rank] >= 0
                merge_entries(
                    rows,
                    stamp,
                    control,
                    clock,
                    samples[rank][held].to(rows.device),
                    entries[rank][held].to(rows.device),
                )
