"""`ntpseg.losses.compaction` on a GPU: a dozen launches and at most one synchronisation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ntpseg.kernels.compaction import BatchLayout, SupervisedCells, find_supervised, write_rows
from ntpseg.kernels.gather_scatter import gather_rows, scatter_results
from ntpseg.kernels.hard_tokens import hard_token_table, rank_hard_tokens
from ntpseg.losses.compaction import OUT_OF_RANGE, TOO_MANY_ROWS, Rows, filled, raise_out_of_range
from ntpseg.losses.options import LossOptions


@dataclass(frozen=True)
class KernelPlan:
    """What `ntpseg.losses.compaction.RowPlan` is, with `slot` ``[B * T * k]``: the row of each (sample, time, head)."""

    rows: Rows
    ntp_share: Tensor
    shape: tuple[int, int, int]
    shift: int
    slot: Tensor

    def results(self, prediction: Tensor, nll: Tensor, margin: Tensor, low: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `RowPlan.results`."""
        return scatter_results(self.slot, prediction, nll, margin, self.shape, self.shift, low)

    def gradient(self, d_rows: Tensor) -> Tensor:
        """See `RowPlan.gradient`."""
        return gather_rows(d_rows, self.slot).view(*self.shape, d_rows.shape[1])


def plan_by_kernels(
    hidden: Tensor,
    labels: Tensor,
    classes: int,
    options: LossOptions,
    *,
    per_head_weight: bool,
    het_position: Tensor | None = None,
    het_token: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_rows: Tensor | None = None,
    num_het: Tensor | None = None,
) -> KernelPlan:
    """See `ntpseg.losses.compaction.plan_rows` for the arguments and errors; not for float64."""
    batch, time, heads, _ = hidden.shape
    low = options.vocab_range[0] if options.vocab_range else 0
    layout = BatchLayout(heads, batch, time, int(options.shift), options.ignore_index, low, classes)
    labels = labels.contiguous()
    cells = find_supervised(labels, None if token_weights is None else token_weights.contiguous(), layout)
    hard = None
    if het_position is not None and het_token is not None and het_position.numel():
        het_token = het_token.contiguous()
        hard = rank_hard_tokens(het_position.contiguous(), het_token, labels, cells, layout)

    # a sum per head is deterministic on every device
    num_rows = cells.token_weight.view(heads, -1).sum(1) if num_rows is None else num_rows.to(torch.float32)
    slots = 0 if hard is None else hard[0].shape[1]
    segments, most = _sizes(cells, labels, layout, options, per_head_weight, slots)
    count = segments[-1][1]
    made = write_rows(
        labels,
        cells,
        num_rows,
        num_het,
        filled(options.head_weights, torch.float32, hidden.device) if options.head_weights else None,
        layout,
        options.negatives,
        count,
        padded=options.max_rows is not None,
        segments=per_head_weight,
    )
    if hard is None or het_token is None:
        table = labels.new_empty(count, 0)
    else:
        table = hard_token_table(het_token, *hard, made.inverse_index, layout, count, most)
    rows = Rows(
        hidden=gather_rows(hidden, made.gather_index),
        target=made.target,
        share=made.row_weight,
        reach=made.num_negatives,
        het=table,
        het_share=made.entry_weight,
        segments=segments,
        index=made.index,
    )
    return KernelPlan(rows, made.ntp_weight, (batch, time, heads), layout.shift, made.inverse_index)


def _sizes(
    cells: SupervisedCells, labels: Tensor, layout: BatchLayout, options: LossOptions, per_head: bool, slots: int
) -> tuple[tuple[tuple[int, int], ...], int]:
    """Segments and the width of the table of hard tokens, as host integers; checks the labels."""
    per_head_cells = layout.cells // layout.heads
    ends = cells.prefix_sum[per_head_cells - 1 :: per_head_cells]
    groups = layout.heads if per_head else 1
    if options.max_rows is not None:
        size = min(options.max_rows * (layout.heads // groups), layout.cells // groups)
        counts = ends.diff(prepend=ends.new_zeros(1)) if per_head else ends[-1:]
        torch._assert_async((counts <= size).all(), TOO_MANY_ROWS)
        torch._assert_async(cells.status[0] == 0, OUT_OF_RANGE)
        return tuple((j * size, (j + 1) * size) for j in range(groups)), slots
    bad, most, _, *edges = torch.cat([cells.status, ends]).tolist()  # the one look at the device
    if bad:
        cell = bad - 1
        place = cell % layout.time + layout.shift + cell // per_head_cells
        raise_out_of_range(int(labels[cell // layout.time % layout.batch, place]), layout.class_start, layout.classes)
    return (tuple(itertools.pairwise([0, *edges])) if per_head else ((0, edges[-1]),)), most
