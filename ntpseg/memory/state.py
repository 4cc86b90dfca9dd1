"""The saved form of a hard-token memory: versioned, exact, and no larger than the errors that it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FORMAT = "ntpseg.hard_token_memory"
VERSION = 1
_CHUNK = 1 << 16


def pack(rows: Tensor, stamp: Tensor, epoch: int) -> dict[str, Tensor]:
    """Return one epoch's entries without the empty slots.

    Args:
        rows: ``[2, N, 3, n]`` int32.
        stamp: ``[2, N]`` int32.
        epoch: the epoch wanted; epoch 0 has no entries.

    Returns:
        CPU tensors ``sample [S]`` int64, ``count [S]`` int32 and, one after another for those samples, ``deviation``
        float32, ``position`` int32 and ``token`` int32, each ``[sum of count]``.
    """
    visited = (stamp[epoch % 2] == epoch).nonzero().squeeze(1) if epoch > 0 else torch.empty(0, dtype=torch.int64)
    counts, entries = [], []
    for sample in visited.split(_CHUNK):
        block = rows[epoch % 2][sample.to(rows.device)].cpu()
        filled = block[:, 1] >= 0
        counts.append(filled.sum(1).int())
        entries.append(block.transpose(1, 2)[filled])
    count = torch.cat(counts) if counts else torch.empty(0, dtype=torch.int32)
    entry = torch.cat(entries) if entries else torch.empty(0, 3, dtype=torch.int32)
    deviation, position, token = (column.contiguous() for column in entry.unbind(1))
    return {
        "sample": visited.cpu(),
        "count": count,
        "deviation": deviation.view(torch.float32),
        "position": position,
        "token": token,
    }


def unpack(packed: Any, rows: Tensor, stamp: Tensor, epoch: int) -> None:
    """Write what `pack` returned into the buffer of ``epoch``, in place."""
    n = rows.shape[3]
    start = 0
    blank = torch.tensor([-torch.inf]).view(torch.int32)
    for sample, count in zip(packed["sample"].split(_CHUNK), packed["count"].split(_CHUNK)):
        stop = start + int(count.sum())
        columns = [packed["deviation"].view(torch.int32), packed["position"], packed["token"]]
        entry = torch.stack([column[start:stop] for column in columns], dim=1)
        block = torch.full((sample.numel(), n, 3), -1, dtype=torch.int32)
        block[:, :, 0] = blank
        block[torch.arange(n) < count.unsqueeze(1)] = entry
        target = sample.to(rows.device)
        rows[epoch % 2, target] = block.transpose(1, 2).to(rows.device)
        stamp[epoch % 2, target] = epoch
        start = stop


def check(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Refuse a state, or the header of a mapped memory, that does not belong to a memory.

    Args:
        saved: what was saved.
        mine: the same fields of the memory that is to take it.

    Raises:
        ValueError: naming what differs.
    """
    if saved.get("format") != FORMAT:
        raise ValueError(f"the state's format must be {FORMAT!r}, got {saved.get('format')!r}")
    if saved["version"] != VERSION:
        raise ValueError(f"the state's version must be {VERSION} for this release of ntpseg, got {saved['version']}")
    for name in ("num_samples", "n", "deviation"):
        if saved[name] != mine[name]:
            raise ValueError(f"the state's {name} must be {mine[name]!r} as in this memory, got {saved[name]!r}")
    if None not in (saved["key"], mine["key"]) and saved["key"] != mine["key"]:
        raise ValueError(
            f"the state's content key must be {mine['key']!r}, got {saved['key']!r}: the data set, or the order of its "
            "samples, is not the one that these errors were recorded on"
        )
