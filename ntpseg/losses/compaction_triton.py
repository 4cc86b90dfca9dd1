"""`ntpseg.losses.compaction` on a GPU: a dozen launches and at most one wait, for an event that comes early."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ntpseg.kernels.chunks import WORKSPACE_BYTES
from ntpseg.kernels.compaction import BatchLayout, RowTable, SupervisedCells, find_supervised, write_rows
from ntpseg.kernels.fused_forward import early_config, launch_early
from ntpseg.kernels.gather_scatter import gather_rows, gather_rows_dot, scatter_results
from ntpseg.kernels.hard_tokens import hard_token_table, rank_hard_tokens
from ntpseg.kernels.loss_terms import loss_terms
from ntpseg.kernels.row_reduce import overflow_gap
from ntpseg.kernels.workspace import Anchors
from ntpseg.losses.backends import RowsResult
from ntpseg.losses.compaction import Compaction, Rows, check_max_rows, refuse
from ntpseg.losses.host_copy import HostCopy
from ntpseg.losses.options import LossOptions, TokenResults
from ntpseg.losses.supervision import Supervision, filled
from ntpseg.losses.value_checks import LABELS, NUM_ITEMS, TOKEN_WEIGHTS, raise_first

# Rows are gathered before their number is known where room for all that can be takes at most this part of a workspace.
EARLY_SHARE = 2


@dataclass(frozen=True)
class TritonCompaction(Compaction):
    """`Compaction` with kernels.

    Attributes:
        inverse_index: ``[B * T * k]`` int32, the row of each (sample, time, head), -1 = none.
    """

    inverse_index: Tensor

    def scatter_results(self, prediction: Tensor, nll: Tensor, margin: Tensor, class_start: int) -> TokenResults:
        """See `Compaction.scatter_results`."""
        return TokenResults(
            *scatter_results(self.inverse_index, prediction, nll, margin, self.shape, self.shift, class_start)
        )

    def scatter_gradient(self, d_rows: Tensor) -> Tensor:
        """See `Compaction.scatter_gradient`."""
        # a gather by the inverse index: every place is written once, the empty ones included
        return gather_rows(d_rows, self.inverse_index).view(*self.shape, d_rows.shape[1])

    def loss_terms(self, result: RowsResult, options: LossOptions) -> tuple[Tensor, Tensor]:
        """See `Compaction.loss_terms`; sums in float64."""
        return loss_terms(
            self.ntp_weight,
            self.rows.row_weight,
            result.nll,
            result.tcl,
            result.het,
            result.lse,
            self.rows.entry_weight,
            tcl_weight=options.tcl_weight,
            het_weight=options.het_weight,
            z_loss=options.z_loss,
        )


def compact_triton(
    hidden: Tensor,
    supervision: Supervision,
    classes: int,
    options: LossOptions,
    *,
    per_head_weight: bool,
    weight: Tensor | None = None,
    gradient: bool = True,
) -> TritonCompaction:
    """See `ntpseg.losses.compaction.compact` for the arguments and errors; not for float64.

    With `weight`, all classes of it, the targets' logits are computed in the pass that gathers the rows, and the
    forward product is launched before the rows are counted where it is one for all heads and `early_config` allows it.
    It keeps E if a `gradient` is wanted.

    Counts rows and entries in the kernels that find them, by the rule of `ntpseg.losses.supervision`: its operators
    would be as many launches again.
    """
    batch, time, heads, _ = hidden.shape
    low = options.vocab_range[0] if options.vocab_range else 0
    layout = BatchLayout(heads, batch, time, int(options.shift), options.ignore_index, low, classes)
    labels, token_weights = supervision.labels.contiguous(), supervision.token_weights
    cells = find_supervised(
        labels,
        None if token_weights is None else token_weights.contiguous(),
        layout,
        supervision.num_rows,
        supervision.num_het,
        signed_weights=supervision.signed_weights,
    )
    position, token, ranked = supervision.het_position, supervision.het_token, None
    if position is not None and token is not None and position.numel():
        token = token.contiguous()
        ranked = rank_hard_tokens(position.contiguous(), token, labels, cells, layout)

    if supervision.num_rows is None:
        # a sum per head is deterministic on every device
        num_rows = cells.token_weight.view(heads, -1).sum(1)
    else:
        num_rows = supervision.num_rows.to(torch.float32)
    explain = functools.partial(_explain, supervision, layout, options)
    slots = 0 if ranked is None else ranked[0].shape[1]
    padded = options.max_rows is not None
    if padded:
        segments, width = _fixed_segments(cells, layout, options, per_head_weight, explain), slots
        room = segments[-1][1]
    else:
        room = layout.max_supervised
    # the device gathers while the counts travel and the host reads them, and goes on with the product
    gathers_early = padded or room * hidden.shape[-1] * hidden.itemsize <= WORKSPACE_BYTES // EARLY_SHARE
    config = None
    if gathers_early and not padded and weight is not None and not per_head_weight:
        config = early_config(room, weight, options.chunk_bytes, options.gradient_filter)
    table = write_rows(
        labels,
        cells,
        num_rows,
        supervision.num_het,
        filled(options.head_weights, torch.float32, hidden.device) if options.head_weights else None,
        layout,
        options.negatives,
        room,
        segments=padded and per_head_weight,
        block_rows=1 if config is None else config.BLOCK_M,
    )
    copy = None if padded else HostCopy.start(table.counts)
    gathered = _gather(hidden, table, weight) if gathers_early else None
    forward = None
    if config is not None and weight is not None and gathered is not None and gathered[1] is not None:
        forward = launch_early(gathered[0], weight, gathered[1], table.num_row_blocks, config, gradient=gradient)
    if copy is not None:
        bad_label, width, _, bad_weight, bad_count, *edges = copy.wait()
        if bad_label or bad_weight or bad_count:
            explain()
        segments = tuple(itertools.pairwise([0, *edges])) if per_head_weight else ((0, edges[-1]),)
        table = table.cut(edges[-1])
    total_rows = segments[-1][1]
    compact_hidden, anchors = _gather(hidden, table, weight) if gathered is None else gathered
    if ranked is None or token is None:
        hard_tokens = labels.new_empty(total_rows, 0)
    else:
        hard_tokens = hard_token_table(token, *ranked, table.inverse_index, layout, total_rows, width)
    rows = Rows(
        hidden=compact_hidden[:total_rows],
        target=table.target,
        row_weight=table.row_weight,
        num_negatives=table.num_negatives,
        hard_tokens=hard_tokens,
        entry_weight=table.entry_weight,
        segments=segments,
        index=table.index,
        gather_index=table.gather_index,
        inverse_index=table.inverse_index,
        anchors=None if anchors is None else anchors[:total_rows],
        forward=forward,
    )
    return TritonCompaction(rows, table.ntp_weight, (batch, time, heads), layout.shift, table.inverse_index)


def _gather(hidden: Tensor, table: RowTable, weight: Tensor | None) -> tuple[Tensor, Anchors | None]:
    """The rows and, with a weight, their anchors; what is no class, or no row, is not followed."""
    if weight is None:
        return gather_rows(hidden, table.gather_index), None
    return gather_rows_dot(hidden, table.gather_index, weight, table.target, overflow_gap(hidden.dtype))


def _explain(supervision: Supervision, layout: BatchLayout, options: LossOptions) -> None:
    """Raises the error that names the value which `find_supervised` found to be wrong."""
    checked = None if supervision.signed_weights else supervision.token_weights
    counts = [supervision.num_rows, supervision.num_het]
    raise_first(supervision.labels, checked, counts, options, layout.classes, torch.float32)


def _fixed_segments(
    cells: SupervisedCells, layout: BatchLayout, options: LossOptions, per_head: bool, explain: Callable[[], None]
) -> tuple[tuple[int, int], ...]:
    """Segments of ``max_rows``, which no device is asked for; refuses there what `find_supervised` found."""
    assert options.max_rows is not None
    head_cells = layout.cells // layout.heads
    ends = cells.prefix_sum[head_cells - 1 :: head_cells]
    groups = layout.heads if per_head else 1
    size = min(options.max_rows * (layout.heads // groups), layout.cells // groups)
    counts = ends.diff(prepend=ends.new_zeros(1)) if per_head else ends[-1:]
    check_max_rows(counts, size, options)
    bad = cells.status != 0
    refuse([(LABELS, bad[0]), (TOKEN_WEIGHTS, bad[3]), (NUM_ITEMS, bad[4])], options, explain)
    return tuple((j * size, (j + 1) * size) for j in range(groups))
