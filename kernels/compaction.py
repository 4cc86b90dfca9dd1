"""Compaction: the supervised rows of a batch, in a few launches and at most one synchronisation.

A cell is a (head j, sample b, time t), in this order; it predicts the label at ``t + shift + j``. Supervised cells
become rows, in the order of cells.

Reference: `ntpseg.losses.compaction.compact`, a hundred small operators of PyTorch, which a GPU would wait for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED


@dataclass(frozen=True)
class BatchLayout:
    """Sizes and constants of one call.

    Attributes:
        heads, batch, time: k, B and T.
        shift: 1 where head 0 predicts the next position, else 0.
        ignore_index: label of an unsupervised position.
        class_start, classes: the slice of the vocabulary that takes part.
    """

    heads: int
    batch: int
    time: int
    shift: int
    ignore_index: int
    class_start: int
    classes: int

    @property
    def cells(self) -> int:
        """``k * B * T``."""
        return self.heads * self.batch * self.time

    @property
    def max_supervised(self) -> int:
        """The most cells that can be supervised: those whose position lies in the sequence."""
        return self.batch * sum(max(self.time - self.shift - head, 0) for head in range(self.heads))


@dataclass(frozen=True)
class SupervisedCells:
    """Which cells are supervised; all ``[k * B * T]`` but for `status`.

    Attributes:
        token_weight: fp32, weight of each cell, 0 where it is unsupervised.
        supervised: int32, 1 where it is supervised.
        prefix_sum: int64, number of supervised cells up to and with this one.
        status: ``[5]`` int32: one more than the last cell whose label is out of range, or 0; the most hard tokens of
            any row; the number of hard tokens that count; one more than the last cell whose weight is negative or not
            finite, or 0; how many of the given counts are.
    """

    token_weight: Tensor
    supervised: Tensor
    prefix_sum: Tensor
    status: Tensor


@triton.jit
def label_of(labels, cell, cell_mask, batch, time, shift, ignore):
    """Label that a cell predicts (`ignore` beyond the end of its sequence), its offset and whether it is within."""
    head = cell // (batch * time)
    position = cell % time + shift + head
    sample = cell // time % batch
    in_sequence = cell_mask & (position < time)
    offsets = sample * time + position
    return tl.load(labels + offsets, mask=in_sequence, other=ignore), offsets, in_sequence


@triton.jit
def is_count(x):
    """Whether a weight or a count is what it may be; not-a-number compares as false."""
    return (x >= 0) & (x < float("inf"))


@triton.jit(do_not_specialize=["cells", "heads", "batch", "time", "shift", "ignore", "class_start", "classes"])
def find_supervised_kernel(
    labels,
    weights_ptr,
    num_rows_ptr,
    num_het_ptr,
    token_weight_ptr,
    supervised_ptr,
    status_ptr,
    cells,
    heads,
    batch,
    time,
    shift,
    ignore,
    class_start,
    classes,
    WEIGHTED: tl.constexpr,
    SIGNED: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    cell_mask = cell < cells
    label, offsets, in_sequence = label_of(labels, cell, cell_mask, batch, time, shift, ignore)
    supervised = in_sequence & (label != ignore)
    token_weight = tl.where(supervised, 1.0, 0.0)
    if WEIGHTED:
        token_weight = tl.where(
            supervised, tl.load(weights_ptr + offsets, mask=in_sequence, other=0.0).to(tl.float32), 0.0
        )
        if not SIGNED:
            last_bad_weight = tl.max(tl.where(supervised & (is_count(token_weight) == 0), cell + 1, 0), 0)
            if last_bad_weight > 0:
                tl.atomic_max(status_ptr + 3, last_bad_weight.to(tl.int32))
    if COUNTED:  # noqa: SIM102  # decided when it is compiled, the other when it runs
        if tl.program_id(0) == 0:
            bad_counts = tl.where(is_count(tl.load(num_het_ptr)), 0, 1)
            for j in range(heads):
                bad_counts += tl.where(is_count(tl.load(num_rows_ptr + j)), 0, 1)
            tl.store(status_ptr + 4, bad_counts)
    tl.store(token_weight_ptr + cell, token_weight, mask=cell_mask)
    tl.store(supervised_ptr + cell, supervised.to(tl.int32), mask=cell_mask)
    bad = supervised & ((label < class_start) | (label >= class_start + classes))
    last_bad = tl.max(tl.where(bad, cell + 1, 0), 0)
    if last_bad > 0:
        tl.atomic_max(status_ptr, last_bad.to(tl.int32))


def find_supervised(
    labels: Tensor,
    token_weights: Tensor | None,
    layout: BatchLayout,
    num_rows: Tensor | None = None,
    num_het: Tensor | None = None,
    *,
    signed_weights: bool = False,
) -> SupervisedCells:
    """Finds the supervised cells, and in passing what no label, weight or count may be.

    Args:
        labels: ``[B, T]`` int64 contiguous.
        token_weights: ``[B, T]`` float contiguous, by the position of the label, or None.
        layout: sizes.
        num_rows: ``[k]`` float contiguous, or None; num_het: 0-dim float or None, only with it.
        signed_weights: the token weights may be anything.
    """
    cells, device = layout.cells, labels.device
    token_weight = torch.empty(cells, dtype=torch.float32, device=device)
    supervised = torch.empty(cells, dtype=torch.int32, device=device)
    status = torch.zeros(5, dtype=torch.int32, device=device)
    size = 4096 if INTERPRETED else 512
    find_supervised_kernel[(triton.cdiv(cells, size),)](
        labels,
        labels if token_weights is None else token_weights,
        labels if num_rows is None else num_rows,
        (labels if num_rows is None else num_rows) if num_het is None else num_het,
        token_weight,
        supervised,
        status,
        cells,
        layout.heads,
        layout.batch,
        layout.time,
        layout.shift,
        layout.ignore_index,
        layout.class_start,
        layout.classes,
        WEIGHTED=token_weights is not None,
        SIGNED=signed_weights,
        COUNTED=num_rows is not None,
        BLOCK_SIZE=size,
        num_warps=4,
    )
    return SupervisedCells(token_weight, supervised, supervised.cumsum(0), status)


@triton.jit(
    do_not_specialize=[
        "cells",
        "heads",
        "batch",
        "time",
        "shift",
        "ignore",
        "class_start",
        "classes",
        "negatives",
        "rows_per_segment",
        "block_rows",
    ]
)
def write_rows_kernel(
    labels,
    token_weight_ptr,
    supervised_ptr,
    prefix_sum_ptr,
    num_rows_ptr,
    head_weight_ptr,
    num_het_ptr,
    status_ptr,
    counts_ptr,
    index_ptr,
    target_ptr,
    gather_index_ptr,
    inverse_index_ptr,
    num_negatives_ptr,
    row_weight_ptr,
    ntp_weight_ptr,
    entry_weight_ptr,
    num_row_blocks_ptr,
    cells,
    heads,
    batch,
    time,
    shift,
    ignore,
    class_start,
    classes,
    negatives,
    rows_per_segment,
    block_rows,
    HEAD_WEIGHTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    cell_mask = cell < cells
    head = cell // (batch * time)
    position = cell % time
    supervised = tl.load(supervised_ptr + cell, mask=cell_mask, other=0) != 0
    prefix_sum = tl.load(prefix_sum_ptr + cell, mask=cell_mask, other=0)
    row = prefix_sum - 1
    # unsupervised cells write the places behind the last row: the n-th of them the n-th place
    if SEGMENTS:  # every head's rows start at a multiple of `rows_per_segment`, however many they are
        first_cell = head * batch * time
        before = tl.load(prefix_sum_ptr + first_cell - 1, mask=cell_mask & (head > 0), other=0)
        found = tl.load(prefix_sum_ptr + first_cell + batch * time - 1, mask=cell_mask, other=0) - before
        segment_start = head * rows_per_segment
        row = row - before + segment_start
        place = segment_start + found + (cell - first_cell) - (prefix_sum - before)
        end = segment_start + rows_per_segment
    else:
        place = tl.load(prefix_sum_ptr + cells - 1) + cell - prefix_sum
        end = rows_per_segment + tl.zeros_like(cell)
    is_padding = cell_mask & ~supervised & (place < end)
    supervised = supervised & (row < end)
    written = supervised | is_padding

    # (sample, time, head) is the order of hidden
    hidden_row = (cell - head * batch * time) * heads + head
    tl.store(inverse_index_ptr + hidden_row, tl.where(supervised, row, -1).to(tl.int32), mask=cell_mask)
    row = tl.where(supervised, row, place)
    tl.store(gather_index_ptr + row, tl.where(supervised, hidden_row, -1), mask=written)
    tl.store(index_ptr + row, tl.where(supervised, cell, -1), mask=written)
    label, _, _ = label_of(labels, cell, cell_mask, batch, time, shift, ignore)
    # kernels read the weight at the target before the host knows that a label is wrong
    in_range = supervised & (label >= class_start) & (label < class_start + classes)
    tl.store(target_ptr + row, tl.where(in_range, label - class_start, -1), mask=written)

    # supervised cells among those at most `negatives` earlier in the same sequence
    window_start = cell - tl.minimum(position, negatives)
    before_window = tl.load(prefix_sum_ptr + window_start, mask=cell_mask, other=0) - tl.load(
        supervised_ptr + window_start, mask=cell_mask, other=0
    )
    tl.store(
        num_negatives_ptr + row, tl.where(supervised, prefix_sum - 1 - before_window, 0).to(tl.int32), mask=written
    )

    denominator = 0.0
    for j in range(heads):
        rows = tl.load(num_rows_ptr + j)
        if HEAD_WEIGHTS:
            rows = rows * tl.load(head_weight_ptr + j)
        denominator += rows
    token_weight = tl.load(token_weight_ptr + cell, mask=supervised, other=0.0)
    weighted = token_weight
    if HEAD_WEIGHTS:
        weighted = token_weight * tl.load(head_weight_ptr + head, mask=cell_mask, other=0.0)
    row_weight = tl.where(denominator > 0, tl.div_rn(weighted, tl.where(denominator > 0, denominator, 1.0)), 0.0)
    tl.store(row_weight_ptr + row, tl.where(supervised, row_weight, 0.0), mask=written)
    ntp_denominator = tl.load(num_rows_ptr)
    ntp_weight = tl.where(
        ntp_denominator > 0, tl.div_rn(token_weight, tl.where(ntp_denominator > 0, ntp_denominator, 1.0)), 0.0
    )
    tl.store(ntp_weight_ptr + row, tl.where(supervised & (head == 0), ntp_weight, 0.0), mask=written)
    if tl.program_id(0) == 0:
        for i in range(5):
            tl.store(counts_ptr + i, tl.load(status_ptr + i).to(tl.int64))
        for j in range(heads):
            tl.store(counts_ptr + 5 + j, tl.load(prefix_sum_ptr + (j + 1) * batch * time - 1))
        tl.store(num_row_blocks_ptr, tl.cdiv(tl.load(prefix_sum_ptr + cells - 1), block_rows).to(tl.int32))
        entries = tl.load(num_het_ptr).to(tl.float32)
        tl.store(entry_weight_ptr, tl.where(entries > 0, tl.div_rn(1.0, tl.where(entries > 0, entries, 1.0)), 0.0))


@dataclass(frozen=True)
class RowTable:
    """The rows and where they came from.

    Attributes:
        index, target, gather_index: ``[R]`` int64, cell, label and row of ``[B, T, k]``; -1 on padding rows.
        num_negatives: ``[R]`` int32; row_weight, ntp_weight: ``[R]`` fp32; 0 on padding rows.
        entry_weight: 0-dim fp32, weight of one hard token.
        inverse_index: ``[B * T * k]`` int32, the row made of each (sample, time, head), -1 = none.
        counts: ``[5 + k]`` int64, `SupervisedCells.status` and the supervised cells up to the end of every head.
        num_row_blocks: 0-dim int32, blocks of rows that all supervised cells are.
    """

    index: Tensor
    target: Tensor
    gather_index: Tensor
    num_negatives: Tensor
    row_weight: Tensor
    ntp_weight: Tensor
    entry_weight: Tensor
    inverse_index: Tensor
    counts: Tensor
    num_row_blocks: Tensor

    def cut(self, rows: int) -> RowTable:
        """The first rows, as views."""
        return RowTable(
            self.index[:rows],
            self.target[:rows],
            self.gather_index[:rows],
            self.num_negatives[:rows],
            self.row_weight[:rows],
            self.ntp_weight[:rows],
            self.entry_weight,
            self.inverse_index,
            self.counts,
            self.num_row_blocks,
        )


def write_rows(
    labels: Tensor,
    cells: SupervisedCells,
    num_rows: Tensor,
    num_het: Tensor | None,
    head_weights: Tensor | None,
    layout: BatchLayout,
    negatives: int,
    total_rows: int,
    *,
    segments: bool,
    block_rows: int = 1,
) -> RowTable:
    """Writes the rows.

    Args:
        labels: ``[B, T]`` int64 contiguous.
        cells: from `find_supervised`.
        num_rows: ``[k]`` fp32; num_het: 0-dim, None for the entries that count in this batch.
        head_weights: ``[k]`` fp32, None for weights of one.
        layout: sizes.
        negatives: m.
        total_rows: R, at most ``k * B * T``; with fewer supervised cells the rest is padding; with more, which is an
            error, those are left out. A label out of range makes a row without a target.
        segments: whether each head has ``total_rows / k`` rows of its own.
        block_rows: rows of a block, for ``num_row_blocks``.
    """
    device = labels.device
    # one allocation each, as in `ntpseg.kernels.workspace`
    index, target, gather_index = (torch.empty(total_rows, dtype=torch.int64, device=device) for _ in range(3))
    row_weight, ntp_weight = (torch.empty(total_rows, dtype=torch.float32, device=device) for _ in range(2))
    entry_weight = torch.empty((), dtype=torch.float32, device=device)
    num_negatives = torch.empty(total_rows, dtype=torch.int32, device=device)
    counts = torch.empty(5 + layout.heads, dtype=torch.int64, device=device)
    inverse_index = torch.empty(layout.cells, dtype=torch.int32, device=device)
    num_row_blocks = torch.empty((), dtype=torch.int32, device=device)
    size = 4096 if INTERPRETED else 512
    write_rows_kernel[(triton.cdiv(layout.cells, size),)](
        labels,
        cells.token_weight,
        cells.supervised,
        cells.prefix_sum,
        num_rows,
        num_rows if head_weights is None else head_weights,
        cells.status[2] if num_het is None else num_het,
        cells.status,
        counts,
        index,
        target,
        gather_index,
        inverse_index,
        num_negatives,
        row_weight,
        ntp_weight,
        entry_weight,
        num_row_blocks,
        layout.cells,
        layout.heads,
        layout.batch,
        layout.time,
        layout.shift,
        layout.ignore_index,
        layout.class_start,
        layout.classes,
        negatives,
        total_rows // layout.heads if segments else total_rows,
        block_rows,
        HEAD_WEIGHTS=head_weights is not None,
        SEGMENTS=segments,
        BLOCK_SIZE=size,
        num_warps=4,
    )
    return RowTable(
        index,
        target,
        gather_index,
        num_negatives,
        row_weight,
        ntp_weight,
        entry_weight,
        inverse_index,
        counts,
        num_row_blocks,
    )
