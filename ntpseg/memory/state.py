"""The saved form of a hard-token memory: versioned, exact, and no larger than the errors that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

FORMAT = "ntpseg.hard_token_memory"
VERSION = 1
_CHUNK = 1 << 14
_NO_DEVIATION = -0x00800000  # the bits of -inf as float32


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
        count, entry = compact(rows[epoch % 2][sample.to(rows.device)].cpu())
        counts.append(count)
        entries.append(entry)
    count = torch.cat(counts) if counts else torch.empty(0, dtype=torch.int32)
    entry = torch.cat(entries) if entries else torch.empty(0, 3, dtype=torch.int32)
    return columns(visited.cpu(), count, entry)


def columns(sample: Tensor, count: Tensor, entry: Tensor) -> dict[str, Tensor]:
    """What `pack` returns, of samples ``[S]`` int64 and what `compact` made of their rows."""
    # Cloned: empty ones would share a storage, which torch.load maps as one dtype for all.
    deviation, position, token = (column.clone() for column in entry.unbind(1))
    return {
        "sample": sample,
        "count": count,
        "deviation": deviation.view(torch.float32),
        "position": position,
        "token": token,
    }


def unpack(packed: Any, rows: Tensor, stamp: Tensor, epoch: int) -> None:
    """Write what `pack` returned into the buffer of ``epoch``, in place."""
    for sample, block in blocks(packed, rows.shape[3]):
        target = sample.to(rows.device)
        rows[epoch % 2, target] = block.to(rows.device)
        stamp[epoch % 2, target] = epoch


def blocks(packed: Any, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of what `pack` returned: samples ``[S]`` int64 and their rows ``[S, 3, n]`` int32, empty slots included."""
    start = 0
    for sample, count in zip(packed["sample"].split(_CHUNK), packed["count"].split(_CHUNK)):
        stop = start + int(count.sum())
        parts = [packed["deviation"].view(torch.int32), packed["position"], packed["token"]]
        entry = torch.stack([part[start:stop] for part in parts], dim=1)
        yield sample, expand(count, entry, n)
        start = stop


def compact(block: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[S, 3, n]`` int32 without their empty slots: counts ``[S]`` int32 and entries ``[sum of counts, 3]``."""
    filled = block[:, 1] >= 0
    return filled.sum(1).int(), block.transpose(1, 2)[filled]


def expand(count: Tensor, entry: Tensor, n: int) -> Tensor:
    """The rows ``[S, 3, n]`` int32 that `compact` was given."""
    block = torch.full((count.numel(), 3, n), -1, dtype=torch.int32, device=entry.device)
    block[:, 0] = _NO_DEVIATION
    block.transpose(1, 2)[torch.arange(n, device=entry.device) < count.unsqueeze(1)] = entry
    return block


def check_epoch(epoch: Any) -> int:
    """The epoch of a saved state; raises a `ValueError` unless it is one."""
    if type(epoch) is not int or not 1 <= epoch < 2**31:
        raise ValueError(f"the state's epoch must be an integer from 1 on, got {epoch!r}")
    return epoch


def check_entries(
    name: str, packed: Any, num_samples: int, n: int, *, vocab_size: int | None = None, length: int | None = None
) -> None:
    """Refuse entries that `pack` cannot have returned.

    Args:
        name: of the entries, ``served`` or ``recording``.
        packed: see `pack`.
        num_samples: N; sample ids are 0 .. N-1, each once and ascending.
        n: entries that a sample can have.
        vocab_size: tokens are below it, where it is known.
        length: positions are below it, where it is known.

    Raises:
        ValueError: naming what is wrong.
    """
    kinds = {"sample": torch.int64, "count": torch.int32, "deviation": torch.float32}
    kinds |= {"position": torch.int32, "token": torch.int32}
    if not isinstance(packed, dict) or set(packed) != set(kinds):
        raise ValueError(f"the state's {name} must hold {', '.join(kinds)}, got {type(packed).__name__}")
    for field, dtype in kinds.items():
        tensor = packed[field]
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() != 1:
            raise ValueError(f"the state's {name}.{field} must be a vector of {dtype}, got another")
    sample, count, entries = packed["sample"], packed["count"], int(packed["count"].sum())
    limits = {
        "sample": (0, num_samples),
        "count": (0, n + 1),
        "position": (0, 2**31 if length is None else length),
        "token": (0, 2**31 if vocab_size is None else vocab_size),
    }
    for field, (low, high) in limits.items():
        tensor = packed[field]
        if tensor.numel() and not low <= int(tensor.min()) <= int(tensor.max()) < high:
            raise ValueError(
                f"the state's {name}.{field} must be in [{low}, {high}), got {int(tensor.min())} .. {int(tensor.max())}"
            )
    if sample.numel() != count.numel() or (sample[1:] <= sample[:-1]).any():
        raise ValueError(f"the state's {name}.sample must hold each sample once, ascending, with its count, got others")
    if any(packed[field].numel() != entries for field in ("deviation", "position", "token")):
        raise ValueError(f"the state's {name} must hold {entries} entries, the sum of its counts, got another number")
    if packed["deviation"].isnan().any():
        raise ValueError(f"the state's {name}.deviation must be numbers, got NaN")


def check(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Refuse a state, or the header of a mapped memory, that does not belong to a memory.

    Args:
        saved: what was saved.
        mine: the same fields of the memory that is to take it.

    Raises:
        ValueError: naming what differs.
    """
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        saved = saved if isinstance(saved, dict) else {}
        raise ValueError(f"the state's format must be {FORMAT!r}, got {saved.get('format')!r}")
    for name in (*mine, "version"):
        if name not in saved:
            raise ValueError(f"the state must hold {name}, got none")
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
