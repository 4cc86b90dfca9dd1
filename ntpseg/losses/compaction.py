"""Compaction: the supervised rows of a batch, in an order that serves every backend, and their results' way back.

Rows are ordered by head, then sample, then time (``(j, b, t)``), so that
- the rows of one head, hence of one weight matrix, are contiguous (`Rows.segments`);
- the negatives of row r are the predictions of the rows just before it: ``r - 1 ... r - num_negatives[r]``.
Prompt positions never become rows and cost nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from ntpseg.losses.options import LossOptions, LossParts, TokenResults
from ntpseg.losses.supervision import Supervision, count_rows, counted_entries, filled, shift_by_head
from ntpseg.losses.value_checks import LABELS, MAX_ROWS, NUM_ITEMS, TOKEN_WEIGHTS, bad_counts, raise_first

if TYPE_CHECKING:
    from ntpseg.kernels.fused_forward import FusedForward
    from ntpseg.kernels.workspace import Anchors
    from ntpseg.losses.backends import RowsResult


@dataclass(frozen=True)
class Rows:
    """The supervised rows of one call: all that a backend needs beside the weight.

    R rows. A row whose target is -1 is padding (only with ``LossOptions.max_rows``, at the end of its segment): it
    takes no part, its prediction is -1 and its other outputs are 0.

    Attributes:
        hidden: ``[R, D]``, contiguous, in the dtype of the matrix products.
        target: ``[R]`` int64, y relative to the start of `vocab_range`.
        row_weight: ``[R]`` float (float64 for float64 rows, else float32), g_r: the row's weight over the denominator
            of CE and TCL. May be 0 on a row that is not padding, even where HET is not: do not divide by it unguarded.
        num_negatives: ``[R]`` int32, how many rows just before this one predict its negatives, 0 .. m.
        hard_tokens: ``[R, h]`` int64, relative to the start of `vocab_range`, -1 = none; never equal to the target.
            h >= 0 is the most that any one row has (or the number of slots with ``max_rows``).
        entry_weight: 0-dim float, 1 / (number of entries): the weight of each hard token in HET.
        segments: per weight matrix its ``(start, stop)`` rows; one segment for a shared ``[V, D]`` weight, k for
            ``[k, V, D]``. Host integers.
        index: ``[R]`` int64, position of the row in a flattened ``[k, B, T]``; -1 for padding.
        gather_index: ``[R]`` int64, position of the row in a flattened ``[B, T, k]``, that of the hidden states; -1 for
            padding. None where a backend has no use for it.
        inverse_index: ``[B * T * k]`` int32, the row of each (sample, time, head), -1 = none; or None with it.
        anchors: of the rows, where finding them has left the logits of their targets, or None. Whoever computes E moves
            some of them, as with `forward`: both serve one call of the backend.
        forward: the forward product, where that was launched before the rows were counted, or None.
    """

    hidden: Tensor
    target: Tensor
    row_weight: Tensor
    num_negatives: Tensor
    hard_tokens: Tensor
    entry_weight: Tensor
    segments: tuple[tuple[int, int], ...]
    index: Tensor
    gather_index: Tensor | None = None
    inverse_index: Tensor | None = None
    anchors: Anchors | None = None
    forward: FusedForward | None = None


@dataclass(frozen=True)
class Compaction:
    """`Rows` with what is needed to turn per-row results into the output, in plain PyTorch.

    `ntpseg.losses.compaction_triton` offers the same with kernels.

    Attributes:
        rows: the compacted rows.
        ntp_weight: ``[R]``, weight of the row in the CE of head 0.
        shape: B, T, k.
        shift: 1 where head 0 predicts the next position, else 0.
    """

    rows: Rows
    ntp_weight: Tensor
    shape: tuple[int, int, int]
    shift: int

    def scatter_results(self, prediction: Tensor, nll: Tensor, margin: Tensor, class_start: int) -> TokenResults:
        """``[R]`` results by position; predictions count from `class_start`, -1 / 0 / 0 where there is no row."""
        prediction = torch.where(self.rows.index < 0, -1, prediction + class_start)
        return TokenResults(self._by_target(prediction, -1), self._by_target(nll, 0), self._by_target(margin, 0))

    def scatter_gradient(self, d_rows: Tensor) -> Tensor:
        """``[R, D]`` as ``[B, T, k, D]``, zero where there is no row."""
        batch, time, heads = self.shape
        cells, cell = self._cells()
        hidden_row = (cell % (batch * time)) * heads + cell // (batch * time)
        d_hidden = d_rows.new_zeros(cells + 1, d_rows.shape[1])
        d_hidden[torch.where(self.rows.index < 0, cells, hidden_row)] = d_rows
        return d_hidden[:-1].view(*self.shape, d_rows.shape[1])

    def loss_terms(self, result: RowsResult, options: LossOptions) -> tuple[Tensor, Tensor]:
        """The loss, 0-dim, and its parts ``[5]`` (`ntpseg.losses.options.LossParts`), in the dtype of the results."""
        row_weight = self.rows.row_weight
        parts = LossParts(
            ntp=(self.ntp_weight * result.nll).sum(),
            nktp=(row_weight * result.nll).sum(),
            tcl=(row_weight * result.tcl).sum(),
            het=result.het.sum() * self.rows.entry_weight,
            z=(row_weight * result.lse.square()).sum(),
        )
        loss = parts.nktp + options.tcl_weight * parts.tcl + options.het_weight * parts.het + options.z_loss * parts.z
        return loss, torch.stack(parts)

    def _cells(self) -> tuple[int, Tensor]:
        """Number of cells and the cell of each row; padding rows land in one cell more, which is cut off."""
        batch, time, heads = self.shape
        cells = heads * batch * time
        return cells, torch.where(self.rows.index < 0, cells, self.rows.index)

    def _by_target(self, values: Tensor, empty: int) -> Tensor:
        batch, time, heads = self.shape
        cells, cell = self._cells()
        flat = values.new_full((cells + 1,), empty)
        flat[cell] = values
        by_row = flat[:-1].view(heads, batch, time)
        by_target = values.new_full((batch, time, heads), empty)
        for offset in range(self.shift, min(heads + self.shift, time)):
            j = offset - self.shift
            by_target[:, offset:, j] = by_row[j, :, : time - offset]
        return by_target


def compact(
    hidden: Tensor, supervision: Supervision, classes: int, options: LossOptions, *, per_head_weight: bool
) -> Compaction:
    """Finds the supervised rows and gathers them.

    Args:
        hidden: ``[B, T, k, D]``.
        supervision: labels, hard tokens, token weights and counts.
        classes: size of the slice of the vocabulary that takes part.
        options: what is not a tensor.
        per_head_weight: whether each head has its own weight, hence its own segment.

    Returns:
        The rows; all tensors on the device of `hidden`.

    Raises:
        ValueError: a label, a token weight or a count is not what `ntpseg.losses.value_checks` says, or there are more
            rows than ``max_rows`` (with that, on a GPU, where looking would synchronise, an assertion on the device).
    """
    batch, time, heads, _ = hidden.shape
    device = hidden.device
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    low = options.vocab_range[0] if options.vocab_range else 0
    labels, token_weights = supervision.labels, supervision.token_weights

    by_row = shift_by_head(labels, heads, options.ignore_index, options)
    supervised = by_row != options.ignore_index
    index, segments = _find(supervised, options, per_head_weight)
    padding = index < 0
    safe = index.clamp_min(0)
    head = safe // (batch * time)
    sample = safe // time % batch
    position = safe % time

    target = by_row.flatten()[safe] - low
    bad = [(LABELS, (((target < 0) | (target >= classes)) & ~padding).any())]
    target = target.masked_fill(padding, -1)

    token_weight = (~padding).to(work)
    if token_weights is not None:
        by_cell = shift_by_head(token_weights, heads, 0.0, options).flatten()[safe].to(work)
        token_weight = torch.where(padding, 0.0, by_cell)  # by zero instead of a choice, not-a-number would stay
        if not supervision.signed_weights:
            bad.append((TOKEN_WEIGHTS, ~((token_weight >= 0) & (token_weight < torch.inf)).all()))
    counts = [supervision.num_rows, supervision.num_het]
    if device.type != "cpu":  # on the CPU they were looked at when they came
        bad += [(NUM_ITEMS, bad_counts(count)) for count in counts if count is not None]
    checked = None if supervision.signed_weights else token_weights
    refuse(bad, options, lambda: raise_first(labels, checked, counts, options, classes, work))
    head_weights = filled(options.head_weights or (1.0,) * heads, work, device)
    num_rows = supervision.num_rows
    num_rows = (count_rows(labels, heads, token_weights, options) if num_rows is None else num_rows).to(work)
    denominator = (num_rows * head_weights).sum()

    # positions of one (head, sample) are consecutive in `index`, so a lower bound finds the first negative's row
    bound = index - position.clamp_max(options.negatives)
    ordered = torch.where(padding, heads * batch * time, index) if options.max_rows is not None else index
    if per_head_weight and options.max_rows is not None:
        first = torch.cat([torch.searchsorted(ordered[a:b], bound[a:b]) + a for a, b in segments])
    else:
        first = torch.searchsorted(ordered, bound)
    num_negatives = torch.arange(len(index), device=device) - first
    num_negatives = num_negatives.masked_fill(padding, 0).to(torch.int32)

    hard_tokens, entries = _hard_token_table(ordered[: segments[0][1]], len(target), supervision, classes, options)
    entries = (entries if supervision.num_het is None else supervision.num_het).to(work)

    rows = Rows(
        hidden=hidden[sample, position, head],
        target=target,
        row_weight=_over(token_weight * head_weights[head], denominator),
        num_negatives=num_negatives,
        hard_tokens=hard_tokens,
        entry_weight=_over(torch.ones((), dtype=work, device=device), entries),
        segments=segments,
        index=index,
    )
    ntp_weight = _over(token_weight * (head == 0), num_rows[0])
    return Compaction(rows, ntp_weight, (batch, time, heads), int(options.shift))


def _find(supervised: Tensor, options: LossOptions, per_head: bool) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Flat positions of the supervised rows and the segments they form."""
    heads, batch, time = supervised.shape
    groups = supervised.flatten(1) if per_head else supervised.reshape(1, -1)
    if options.max_rows is None:
        index = groups.flatten().nonzero().squeeze(1)
        if not per_head:
            return index, ((0, len(index)),)
        edges = torch.searchsorted(index, torch.arange(heads + 1, device=index.device) * batch * time).tolist()
        return index, tuple(itertools.pairwise(edges))
    size = min(options.max_rows * (1 if per_head else heads), groups.shape[1])
    check_max_rows(groups.sum(1), size, options)
    padded = []
    for j, group in enumerate(groups):
        part = torch.nonzero_static(group, size=size, fill_value=-1).squeeze(1)
        padded.append(torch.where(part < 0, -1, part + j * batch * time))
    return torch.cat(padded), tuple((j * size, (j + 1) * size) for j in range(len(groups)))


def _hard_token_table(
    ordered: Tensor, num_rows: int, supervision: Supervision, classes: int, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """``[R, h]`` hard tokens by row and the number of entries that count.

    Args:
        ordered: rows of the first segment, ascending, as positions in a flattened ``[k, B, T]``.
        num_rows: R.
        supervision, classes, options: see `compact`.
    """
    labels, position, token = supervision.labels, supervision.het_position, supervision.het_token
    if position is None or token is None or position.numel() == 0 or ordered.numel() == 0:
        return labels.new_empty(num_rows, 0), torch.zeros((), device=labels.device)
    batch, time = labels.shape
    counts = counted_entries(labels, position, token, options, classes).flatten()
    row_time = (position - int(options.shift)).clamp(0, time - 1)
    cell = (torch.arange(batch, device=labels.device).unsqueeze(1) * time + row_time).flatten()
    row = torch.searchsorted(ordered, cell).clamp_max(len(ordered) - 1)

    # rank of each entry among those of its row: entries that do not count sort behind the last row
    row = torch.where(counts, row, num_rows)
    row, order = row.sort(stable=True)
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    low = options.vocab_range[0] if options.vocab_range else 0
    token = torch.where(counts, token.flatten() - low, -1)[order]
    if options.max_rows is not None:
        width = position.shape[1]
    else:
        width = int(torch.where(row < num_rows, rank + 1, 0).max())
    table = labels.new_full((num_rows + 1, width + 1), -1)  # the last row and column swallow what does not count
    table[row, rank.clamp_max(width)] = token
    return table[:-1, :-1].contiguous(), counts.sum()


def refuse(bad: list[tuple[str, Tensor]], options: LossOptions, explain: Callable[[], None]) -> None:
    """Raise where something is wrong, with one look at the device, or with none of it under ``max_rows``.

    Args:
        bad: what must hold, and a 0-dim bool that is true where it does not.
        options: reads max_rows.
        explain: raises the error that names the value.
    """
    if options.max_rows is not None and bad[0][1].device.type != "cpu":
        for message, found in bad:
            torch._assert_async(~found, message)
    elif bool(torch.stack([found for _, found in bad]).any()):
        explain()


def check_max_rows(rows: Tensor, limit: int, options: LossOptions) -> None:
    """Refuse more rows than were promised.

    Args:
        rows: integers, rows of each group of heads.
        limit: the most that one may have.
        options: reads max_rows.
    """
    most = rows.max()
    refuse([(MAX_ROWS, most > limit)], options, lambda: _raise_too_many(int(most), limit, options))


def _raise_too_many(found: int, limit: int, options: LossOptions) -> NoReturn:
    raise ValueError(f"{MAX_ROWS}, got {options.max_rows}: room for {limit} of {found} rows")


def _over(value: Tensor, count: Tensor) -> Tensor:
    """``value / count``, 0 where nothing is counted."""
    return torch.where(count > 0, value / torch.where(count > 0, count, 1.0), torch.zeros_like(value))
