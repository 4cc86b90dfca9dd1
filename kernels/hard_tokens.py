"""The hard error tokens of a batch, ``[B, n]`` positions and tokens, as a table by row.

Reference: ``ntpseg.losses.compaction._hard_token_table``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.compaction import BatchLayout, SupervisedCells
from ntpseg.kernels.tl_utils import INTERPRETED


@triton.jit(do_not_specialize=["entries", "slots", "time", "shift", "class_start", "classes"])
def count_hard_tokens_kernel(
    position_ptr,
    token_ptr,
    labels,
    supervised_ptr,
    cell_ptr,
    status_ptr,
    entries,
    slots,
    time,
    shift,
    class_start,
    classes,
    BLOCK_SIZE: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    entry_mask = entry < entries
    position = tl.load(position_ptr + entry, mask=entry_mask, other=-1)
    token = tl.load(token_ptr + entry, mask=entry_mask, other=-1)
    offsets = entry // slots * time + position
    counts = entry_mask & (position >= shift) & (position >= 0) & (position < time)
    counts = counts & (token >= class_start) & (token < class_start + classes)
    counts = counts & (tl.load(supervised_ptr + offsets - shift, mask=counts, other=0) != 0)
    counts = counts & (tl.load(labels + offsets, mask=counts, other=0) != token)
    tl.store(cell_ptr + entry, tl.where(counts, offsets - shift, -1).to(tl.int32), mask=entry_mask)
    tl.atomic_add(status_ptr + 2, tl.sum(counts.to(tl.int32), 0))


@triton.jit(do_not_specialize=["slots"])
def rank_hard_tokens_kernel(cell_ptr, rank_ptr, status_ptr, slots, BLOCK_SIZE: tl.constexpr):
    sample_start = tl.program_id(0).to(tl.int64) * slots
    slot = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    cell = tl.load(cell_ptr + sample_start + slot, mask=slot < slots, other=-1)
    rank = tl.zeros((BLOCK_SIZE,), dtype=tl.int32)
    for start in range(0, tl.program_id(1) * BLOCK_SIZE + BLOCK_SIZE, BLOCK_SIZE):
        other = start + tl.arange(0, BLOCK_SIZE)
        other_cell = tl.load(cell_ptr + sample_start + other, mask=other < slots, other=-2)
        earlier = (other_cell[None, :] == cell[:, None]) & (other[None, :] < slot[:, None])
        rank += tl.sum(earlier.to(tl.int32), 1)
    tl.store(rank_ptr + sample_start + slot, rank, mask=slot < slots)
    tl.atomic_max(status_ptr + 1, tl.max(tl.where(cell >= 0, rank + 1, 0), 0))


@triton.jit(do_not_specialize=["entries", "heads", "width", "class_start"])
def hard_token_table_kernel(
    token_ptr,
    cell_ptr,
    rank_ptr,
    inverse_index_ptr,
    table_ptr,
    entries,
    heads,
    width,
    class_start,
    BLOCK_SIZE: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    entry_mask = entry < entries
    cell = tl.load(cell_ptr + entry, mask=entry_mask, other=-1)
    row = tl.load(inverse_index_ptr + cell * heads, mask=cell >= 0, other=-1)
    rank = tl.load(rank_ptr + entry, mask=entry_mask, other=0)
    token = tl.load(token_ptr + entry, mask=entry_mask, other=0)
    tl.store(table_ptr + row.to(tl.int64) * width + rank, token - class_start, mask=(row >= 0) & (rank < width))


def rank_hard_tokens(
    position: Tensor, token: Tensor, labels: Tensor, cells: SupervisedCells, layout: BatchLayout
) -> tuple[Tensor, Tensor]:
    """Which entries count, and the place of each among those of its row; writes ``cells.status[1:3]``.

    Args:
        position, token: ``[B, n]`` int64 contiguous, n >= 1.
        labels: ``[B, T]`` int64 contiguous.
        cells, layout: of the batch.

    Returns:
        ``[B, n]`` int32: cell of head 0 of each entry (-1 = does not count), and its rank.
    """
    batch, slots = position.shape
    cell, rank = (torch.empty(batch, slots, dtype=torch.int32, device=position.device) for _ in range(2))
    size = 4096 if INTERPRETED else 256
    count_hard_tokens_kernel[(triton.cdiv(cell.numel(), size),)](
        position,
        token,
        labels,
        cells.supervised,
        cell,
        cells.status,
        cell.numel(),
        slots,
        layout.time,
        layout.shift,
        layout.class_start,
        layout.classes,
        BLOCK_SIZE=size,
        num_warps=4,
    )
    rank_hard_tokens_kernel[(batch, triton.cdiv(slots, 64))](
        cell, rank, cells.status, slots, BLOCK_SIZE=64, num_warps=4
    )
    return cell, rank


def hard_token_table(
    token: Tensor, cell: Tensor, rank: Tensor, inverse_index: Tensor, layout: BatchLayout, rows: int, width: int
) -> Tensor:
    """``[rows, width]`` int64 table of hard tokens relative to the slice, -1 = none.

    Args:
        token: ``[B, n]`` int64 contiguous.
        cell, rank: from `rank_hard_tokens`.
        inverse_index: of `ntpseg.kernels.compaction.RowTable`.
        layout: sizes.
        rows, width: R and the most entries of a row.
    """
    table = torch.full((rows, width), -1, dtype=torch.int64, device=token.device)
    if table.numel() == 0:
        return table
    size = 4096 if INTERPRETED else 256
    hard_token_table_kernel[(triton.cdiv(token.numel(), size),)](
        token,
        cell,
        rank,
        inverse_index,
        table,
        token.numel(),
        layout.heads,
        width,
        layout.class_start,
        BLOCK_SIZE=size,
        num_warps=4,
    )
    return table
