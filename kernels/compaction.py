"""Which rows are supervised and what each of them is about, in a few launches and at most one synchronisation.

A cell is a (head j, sample b, time t), in this order; it predicts the label at ``t + shift + j``. Supervised cells
become rows, in the order of cells.

Reference: ``ntpseg.losses.compaction.plan_rows``, a hundred small operators of PyTorch, which a GPU would wait for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED


@dataclass(frozen=True)
class Layout:
    """Sizes and constants of one call; the slice of the vocabulary has `classes` classes from `low` on."""

    heads: int
    batch: int
    time: int
    shift: int
    ignore_index: int
    low: int
    classes: int

    @property
    def cells(self) -> int:
        return self.heads * self.batch * self.time


@dataclass(frozen=True)
class Marks:
    """What the first look at the labels finds.

    Attributes:
        unit: ``[k * B * T]`` fp32, weight of each cell, 0 where it is unsupervised.
        flag: the same shape, int32, 1 where it is supervised.
        end: the same shape, int64, number of supervised cells up to and with this one.
        notes: ``[3]`` int32: one more than the last cell whose label is out of range, or 0; the most hard tokens of any
            row; the number of hard tokens that count.
    """

    unit: Tensor
    flag: Tensor
    end: Tensor
    notes: Tensor


@triton.jit
def label_of(labels, cell, inside, batch, time, shift, ignore):
    """Label that a cell predicts, `ignore` beyond the end of its sequence."""
    head = cell // (batch * time)
    position = cell % time + shift + head
    sample = cell // time % batch
    there = inside & (position < time)
    return tl.load(labels + sample * time + position, mask=there, other=ignore), sample * time + position, there


@triton.jit(do_not_specialize=["cells", "batch", "time", "shift", "ignore", "low", "classes"])
def mark_kernel(
    labels,
    weights,
    unit_ptr,
    flag_ptr,
    notes_ptr,
    cells,
    batch,
    time,
    shift,
    ignore,
    low,
    classes,
    WEIGHTED: tl.constexpr,
    SIZE: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = cell < cells
    label, place, there = label_of(labels, cell, inside, batch, time, shift, ignore)
    flag = there & (label != ignore)
    unit = tl.where(flag, 1.0, 0.0)
    if WEIGHTED:
        unit = tl.where(flag, tl.load(weights + place, mask=there, other=0.0).to(tl.float32), 0.0)
    tl.store(unit_ptr + cell, unit, mask=inside)
    tl.store(flag_ptr + cell, flag.to(tl.int32), mask=inside)
    bad = flag & ((label < low) | (label >= low + classes))
    last = tl.max(tl.where(bad, cell + 1, 0), 0)
    if last > 0:
        tl.atomic_max(notes_ptr, last.to(tl.int32))


def mark(labels: Tensor, token_weights: Tensor | None, layout: Layout) -> Marks:
    """Finds the supervised cells.

    Args:
        labels: ``[B, T]`` int64 contiguous.
        token_weights: ``[B, T]`` float contiguous, by the position of the label, or None.
        layout: sizes.
    """
    cells, device = layout.cells, labels.device
    unit = torch.empty(cells, dtype=torch.float32, device=device)
    flag = torch.empty(cells, dtype=torch.int32, device=device)
    notes = torch.zeros(3, dtype=torch.int32, device=device)
    size = 4096 if INTERPRETED else 512
    mark_kernel[(triton.cdiv(cells, size),)](
        labels,
        labels if token_weights is None else token_weights,
        unit,
        flag,
        notes,
        cells,
        layout.batch,
        layout.time,
        layout.shift,
        layout.ignore_index,
        layout.low,
        layout.classes,
        WEIGHTED=token_weights is not None,
        SIZE=size,
        num_warps=4,
    )
    return Marks(unit, flag, flag.cumsum(0), notes)


@triton.jit(do_not_specialize=["cells", "heads", "batch", "time", "shift", "ignore", "low", "negatives", "size"])
def rows_kernel(
    labels,
    unit_ptr,
    flag_ptr,
    end_ptr,
    num_rows_ptr,
    head_weight_ptr,
    num_het_ptr,
    index_ptr,
    target_ptr,
    source_ptr,
    slot_ptr,
    reach_ptr,
    share_ptr,
    ntp_share_ptr,
    het_share_ptr,
    cells,
    heads,
    batch,
    time,
    shift,
    ignore,
    low,
    negatives,
    size,
    HEAD_WEIGHTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = cell < cells
    head = cell // (batch * time)
    step = cell % time
    flag = tl.load(flag_ptr + cell, mask=inside, other=0) != 0
    end = tl.load(end_ptr + cell, mask=inside, other=0)
    slot = end - 1
    if SEGMENTS:  # every head's rows start at a multiple of `size`, however many they are
        before = tl.load(end_ptr + head * batch * time - 1, mask=inside & (head > 0), other=0)
        slot = slot - before + head * size
        flag = flag & (slot < (head + 1) * size)
    elif size >= 0:
        flag = flag & (slot < size)

    # (sample, time, head) is the order of hidden
    row = (cell - head * batch * time) * heads + head
    tl.store(slot_ptr + row, tl.where(flag, slot, -1).to(tl.int32), mask=inside)
    tl.store(source_ptr + slot, row, mask=flag)
    tl.store(index_ptr + slot, cell, mask=flag)
    label, _, _ = label_of(labels, cell, inside, batch, time, shift, ignore)
    tl.store(target_ptr + slot, label - low, mask=flag)

    # supervised cells among those at most `negatives` earlier in the same sequence
    earliest = cell - tl.minimum(step, negatives)
    first = tl.load(end_ptr + earliest, mask=inside, other=0) - tl.load(flag_ptr + earliest, mask=inside, other=0)
    tl.store(reach_ptr + slot, (end - 1 - first).to(tl.int32), mask=flag)

    denominator = 0.0
    for j in range(heads):
        rows = tl.load(num_rows_ptr + j)
        if HEAD_WEIGHTS:
            rows = rows * tl.load(head_weight_ptr + j)
        denominator += rows
    unit = tl.load(unit_ptr + cell, mask=flag, other=0.0)
    weighted = unit
    if HEAD_WEIGHTS:
        weighted = unit * tl.load(head_weight_ptr + head, mask=inside, other=0.0)
    share = tl.where(denominator > 0, tl.div_rn(weighted, tl.where(denominator > 0, denominator, 1.0)), 0.0)
    tl.store(share_ptr + slot, share, mask=flag)
    first_rows = tl.load(num_rows_ptr)
    alone = tl.where(first_rows > 0, tl.div_rn(unit, tl.where(first_rows > 0, first_rows, 1.0)), 0.0)
    tl.store(ntp_share_ptr + slot, tl.where(head == 0, alone, 0.0), mask=flag)
    if tl.program_id(0) == 0:
        entries = tl.load(num_het_ptr).to(tl.float32)
        tl.store(het_share_ptr, tl.where(entries > 0, tl.div_rn(1.0, tl.where(entries > 0, entries, 1.0)), 0.0))


@dataclass(frozen=True)
class PlannedRows:
    """The rows and where they came from.

    Attributes:
        index, target, source: ``[R]`` int64, cell, label and row of ``[B, T, k]``; -1 on padding rows.
        reach: ``[R]`` int32; share, ntp_share: ``[R]`` fp32; 0 on padding rows.
        het_share: 0-dim fp32, weight of one hard token.
        slot: ``[B * T * k]`` int32, the row made of each (sample, time, head), -1 = none.
    """

    index: Tensor
    target: Tensor
    source: Tensor
    reach: Tensor
    share: Tensor
    ntp_share: Tensor
    het_share: Tensor
    slot: Tensor


def make_rows(
    labels: Tensor,
    marks: Marks,
    num_rows: Tensor,
    num_het: Tensor | None,
    head_weights: Tensor | None,
    layout: Layout,
    negatives: int,
    count: int,
    *,
    padded: bool,
    segments: bool,
) -> PlannedRows:
    """Writes the rows.

    Args:
        labels: ``[B, T]`` int64 contiguous.
        marks: from `mark`.
        num_rows: ``[k]`` fp32; num_het: 0-dim, None for the entries that count in this batch.
        head_weights: ``[k]`` fp32, None for weights of one.
        layout: sizes.
        negatives: m.
        count: R, padding rows included.
        padded: whether there may be fewer than `count` supervised cells (or, wrongly, more: those are left out).
        segments: with `padded`, whether each head has ``count / k`` rows of its own.
    """
    device = labels.device
    # one allocation each, as in `ntpseg.kernels.workspace`
    index, target, source = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(3))
    if padded:
        for each in (index, target, source):
            each.fill_(-1)
    room = torch.zeros if padded else torch.empty
    share, ntp_share = (room(count, dtype=torch.float32, device=device) for _ in range(2))
    het_share = torch.empty((), dtype=torch.float32, device=device)
    reach = room(count, dtype=torch.int32, device=device)
    slot = torch.empty(layout.cells, dtype=torch.int32, device=device)
    size = 4096 if INTERPRETED else 512
    rows_kernel[(triton.cdiv(layout.cells, size),)](
        labels,
        marks.unit,
        marks.flag,
        marks.end,
        num_rows,
        num_rows if head_weights is None else head_weights,
        marks.notes[2] if num_het is None else num_het,
        index,
        target,
        source,
        slot,
        reach,
        share,
        ntp_share,
        het_share,
        layout.cells,
        layout.heads,
        layout.batch,
        layout.time,
        layout.shift,
        layout.ignore_index,
        layout.low,
        negatives,
        (count // layout.heads if segments else count) if padded else -1,
        HEAD_WEIGHTS=head_weights is not None,
        SEGMENTS=padded and segments,
        SIZE=size,
        num_warps=4,
    )
    return PlannedRows(index, target, source, reach, share, ntp_share, het_share, slot)
