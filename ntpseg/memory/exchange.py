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
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else "cpu"
    extremes = torch.tensor([epoch, -epoch], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    last, first = int(extremes[0]), -int(extremes[1])
    if first != last:
        raise ValueError(f"all ranks must be in the same epoch, got {first} .. {last}: each must call advance alike")
    for current in (epoch - 1, epoch):
        if current > 0:
            _exchange_epoch(rows, stamp, control, current, device, group)


def _exchange_epoch(rows: Tensor, stamp: Tensor, control: Tensor, epoch: int, device: Any, group: Any) -> None:
    world_size, rank, n = dist.get_world_size(group), dist.get_rank(group), rows.shape[3]
    mine = (stamp[epoch % 2] == epoch).nonzero().squeeze(1)
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([mine.numel()], device=device), group)
    totals = [int(count) for count in counts]
    epoch_tensor = torch.tensor(epoch, device=rows.device)
    chunk = max(1, _BYTES_PER_ROUND // (world_size * 3 * n * 4))
    for start in range(0, max(totals), chunk):
        size = min(chunk, max(totals) - start)
        sample = torch.full((size,), -1, dtype=torch.int64, device=device)
        entry = torch.full((size, 3, n), -1, dtype=torch.int32, device=device)
        sent = mine[start : start + size]
        sample[: sent.numel()] = sent.to(device)
        # Read from a copy taken before this round's merge: later rounds send other rows, so nothing is sent twice.
        entry[: sent.numel()] = rows[epoch % 2][sent].to(device)
        samples = [torch.empty_like(sample) for _ in range(world_size)]
        entries = [torch.empty_like(entry) for _ in range(world_size)]
        dist.all_gather(samples, sample, group)
        dist.all_gather(entries, entry, group)
        for other in range(world_size):
            if other != rank:
                held = samples[other] >= 0
                merge_entries(
                    rows,
                    stamp,
                    control,
                    epoch_tensor,
                    samples[other][held].to(rows.device),
                    entries[other][held].to(rows.device),
                )
