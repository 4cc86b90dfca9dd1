"""The hard error tokens of a batch, ``[B, n]`` positions and tokens, as a table by row.

Reference: ``ntpseg.losses.compaction._het_table``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.compaction import Layout, Marks
from ntpseg.kernels.tl_utils import INTERPRETED


@triton.jit(do_not_specialize=["entries", "slots", "time", "shift", "low", "classes"])
def counting_kernel(
    position_ptr,
    token_ptr,
    labels,
    flag_ptr,
    cell_ptr,
    notes_ptr,
    entries,
    slots,
    time,
    shift,
    low,
    classes,
    SIZE: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = entry < entries
    position = tl.load(position_ptr + entry, mask=inside, other=-1)
    token = tl.load(token_ptr + entry, mask=inside, other=-1)
    row = entry // slots * time + position
    there = inside & (position >= shift) & (position >= 0) & (position < time)
    there = there & (token >= low) & (token < low + classes)
    there = there & (tl.load(flag_ptr + row - shift, mask=there, other=0) != 0)
    there = there & (tl.load(labels + row, mask=there, other=0) != token)
    tl.store(cell_ptr + entry, tl.where(there, row - shift, -1).to(tl.int32), mask=inside)
    tl.atomic_add(notes_ptr + 2, tl.sum(there.to(tl.int32), 0))


@triton.jit(do_not_specialize=["slots"])
def rank_kernel(cell_ptr, rank_ptr, notes_ptr, slots, SIZE: tl.constexpr):
    line = tl.program_id(0).to(tl.int64) * slots
    own = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    cell = tl.load(cell_ptr + line + own, mask=own < slots, other=-1)
    rank = tl.zeros((SIZE,), dtype=tl.int32)
    for start in range(0, tl.program_id(1) * SIZE + SIZE, SIZE):
        other = start + tl.arange(0, SIZE)
        theirs = tl.load(cell_ptr + line + other, mask=other < slots, other=-2)
        earlier = (theirs[None, :] == cell[:, None]) & (other[None, :] < own[:, None])
        rank += tl.sum(earlier.to(tl.int32), 1)
    tl.store(rank_ptr + line + own, rank, mask=own < slots)
    tl.atomic_max(notes_ptr + 1, tl.max(tl.where(cell >= 0, rank + 1, 0), 0))


@triton.jit(do_not_specialize=["entries", "heads", "width", "low"])
def fill_kernel(token_ptr, cell_ptr, rank_ptr, slot_ptr, table_ptr, entries, heads, width, low, SIZE: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = entry < entries
    cell = tl.load(cell_ptr + entry, mask=inside, other=-1)
    slot = tl.load(slot_ptr + cell * heads, mask=cell >= 0, other=-1)
    rank = tl.load(rank_ptr + entry, mask=inside, other=0)
    token = tl.load(token_ptr + entry, mask=inside, other=0)
    tl.store(table_ptr + slot.to(tl.int64) * width + rank, token - low, mask=(slot >= 0) & (rank < width))


def rank_hard(position: Tensor, token: Tensor, labels: Tensor, marks: Marks, layout: Layout) -> tuple[Tensor, Tensor]:
    """Which entries count, and the place of each among those of its row; writes ``marks.notes[1:]``.

    Args:
        position, token: ``[B, n]`` int64 contiguous, n >= 1.
        labels: ``[B, T]`` int64 contiguous.
        marks, layout: of the batch.

    Returns:
        ``[B, n]`` int32: cell of head 0 of each entry (-1 = does not count), and its rank.
    """
    batch, slots = position.shape
    cell, rank = (torch.empty(batch, slots, dtype=torch.int32, device=position.device) for _ in range(2))
    size = 4096 if INTERPRETED else 256
    counting_kernel[(triton.cdiv(cell.numel(), size),)](
        position,
        token,
        labels,
        marks.flag,
        cell,
        marks.notes,
        cell.numel(),
        slots,
        layout.time,
        layout.shift,
        layout.low,
        layout.classes,
        SIZE=size,
        num_warps=4,
    )
    rank_kernel[(batch, triton.cdiv(slots, 64))](cell, rank, marks.notes, slots, SIZE=64, num_warps=4)
    return cell, rank


def hard_table(
    token: Tensor, cell: Tensor, rank: Tensor, slot: Tensor, layout: Layout, rows: int, width: int
) -> Tensor:
    """``[rows, width]`` int64 table of hard tokens relative to the slice, -1 = none.

    Args:
        token: ``[B, n]`` int64 contiguous.
        cell, rank: from `rank_hard`.
        slot: of `ntpseg.kernels.compaction.PlannedRows`.
        layout: sizes.
        rows, width: R and the most entries of a row.
    """
    table = torch.full((rows, width), -1, dtype=torch.int64, device=token.device)
    if table.numel() == 0:
        return table
    size = 4096 if INTERPRETED else 256
    fill_kernel[(triton.cdiv(token.numel(), size),)](
        token, cell, rank, slot, table, token.numel(), layout.heads, width, layout.low, SIZE=size, num_warps=4
    )
    return table
