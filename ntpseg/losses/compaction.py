"""Compaction: which rows are supervised, in an order that serves every backend, and what each of them touches.

Rows are ordered by head, then sample, then time (``(j, b, t)``), so that
- the rows of one head, hence of one weight matrix, are contiguous (`Rows.segments`);
- the negatives of row r are the predictions of the rows just before it: ``r - 1 ... r - reach[r]``.
Prompt positions never become rows and cost nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ntpseg.losses.options import LossOptions

OUT_OF_RANGE = "a label is neither ignore_index nor in the vocabulary or its vocab_range"
TOO_MANY_ROWS = "more supervised rows than LossOptions.max_rows"


@dataclass(frozen=True)
class Rows:
    """The supervised rows of one call: all that a backend needs beside the weight.

    R rows. A row whose target is -1 is padding (only with ``LossOptions.max_rows``, at the end of its segment): it
    takes no part, its prediction is -1 and its other outputs are 0.

    Attributes:
        hidden: ``[R, D]``, contiguous, in the dtype of the matrix products.
        target: ``[R]`` int64, y relative to the start of `vocab_range`.
        share: ``[R]`` float (float64 for float64 rows, else float32), g_r: the row's weight over the denominator of
            CE and TCL. May be 0 on a row that is not padding, even where HET is not: do not divide by it unguarded.
        reach: ``[R]`` int32, how many rows just before this one predict its negatives, 0 .. m.
        het: ``[R, h]`` int64, hard tokens relative to the start of `vocab_range`, -1 = none; never equal to the
            target. h >= 0 is the most that any one row has (or the number of slots with ``max_rows``).
        het_share: 0-dim float, 1 / (number of entries): the weight of each entry in HET.
        segments: per weight matrix its ``(start, stop)`` rows; one segment for a shared ``[V, D]`` weight, k for
            ``[k, V, D]``. Host integers.
        index: ``[R]`` int64, position of the row in a flattened ``[k, B, T]``; -1 for padding.
    """

    hidden: Tensor
    target: Tensor
    share: Tensor
    reach: Tensor
    het: Tensor
    het_share: Tensor
    segments: tuple[tuple[int, int], ...]
    index: Tensor


def shifted_targets(labels: Tensor, heads: int, options: LossOptions) -> Tensor:
    """``[k, B, T]`` labels by row: entry ``[j, b, t]`` is the label of position ``t + shift + j``."""
    target = labels.new_full((heads, *labels.shape), options.ignore_index)
    for j in range(heads):
        offset = j + int(options.shift)
        if offset < labels.shape[1]:
            target[j, :, : labels.shape[1] - offset] = labels[:, offset:]
    return target


def plan_rows(
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
) -> tuple[Rows, Tensor]:
    """Finds the supervised rows and gathers them.

    Args:
        hidden: ``[B, T, k, D]``.
        labels: ``[B, T]`` int64.
        classes: size of the slice of the vocabulary that takes part.
        options: what is not a tensor.
        per_head_weight: whether each head has its own weight, hence its own segment.
        het_position, het_token: ``[B, n]`` int64 or None.
        token_weights: ``[B, T]`` or None, by the position of the predicted token.
        num_rows: ``[k]`` or None, replaces the row counts.
        num_het: 0-dim or None, replaces the entry count.

    Returns:
        The rows and ``[R]``: the weight of each in the CE of head 0; all tensors on the device of `hidden`.

    Raises:
        ValueError: a label is outside the vocabulary (on a GPU with ``max_rows``, where looking would synchronise, an
            assertion on the device).
    """
    batch, time, heads, _ = hidden.shape
    device = hidden.device
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    low = options.vocab_range[0] if options.vocab_range else 0

    by_row = shifted_targets(labels, heads, options)
    supervised = by_row != options.ignore_index
    index, segments = _find(supervised, options, per_head_weight)
    padding = index < 0
    safe = index.clamp_min(0)
    head = safe // (batch * time)
    sample = safe // time % batch
    position = safe % time

    target = by_row.flatten()[safe] - low
    bad = ((target < 0) | (target >= classes)) & ~padding
    if options.max_rows is not None and device.type != "cpu":
        torch._assert_async(~bad.any(), OUT_OF_RANGE)
    elif bool(bad.any()):
        raise_out_of_range(int(target[bad][0]) + low, low, classes)
    target = target.masked_fill(padding, -1)

    unit = (~padding).to(work)
    if token_weights is not None:
        unit = unit * token_weights[sample, (position + int(options.shift) + head).clamp_max(time - 1)].to(work)
    head_weights = filled(options.head_weights or (1.0,) * heads, work, device)
    if num_rows is None:
        # a sum of one column at a time is deterministic on every device, index_add_ is not
        num_rows = torch.stack([(unit * (head == j)).sum() for j in range(heads)])
    num_rows = num_rows.to(work)
    denominator = (num_rows * head_weights).sum()

    # positions of one (head, sample) are consecutive in `index`, so a lower bound finds the first row within reach
    bound = index - position.clamp_max(options.negatives)
    ordered = torch.where(padding, heads * batch * time, index) if options.max_rows is not None else index
    if per_head_weight and options.max_rows is not None:
        first = torch.cat([torch.searchsorted(ordered[a:b], bound[a:b]) + a for a, b in segments])
    else:
        first = torch.searchsorted(ordered, bound)
    reach = torch.arange(len(index), device=device) - first
    reach = reach.masked_fill(padding, 0).to(torch.int32)

    het, entries = _het_table(
        ordered[: segments[0][1]], target, supervised, het_position, het_token, low, classes, options
    )
    entries = entries.to(work) if num_het is None else num_het.to(work)

    rows = Rows(
        hidden=hidden[sample, position, head],
        target=target,
        share=_over(unit * head_weights[head], denominator),
        reach=reach,
        het=het,
        het_share=_over(torch.ones((), dtype=work, device=device), entries),
        segments=segments,
        index=index,
    )
    return rows, _over(unit * (head == 0), num_rows[0])


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
    torch._assert_async((groups.sum(1) <= size).all(), TOO_MANY_ROWS)
    found = []
    for j, group in enumerate(groups):
        part = torch.nonzero_static(group, size=size, fill_value=-1).squeeze(1)
        found.append(torch.where(part < 0, -1, part + j * batch * time))
    return torch.cat(found), tuple((j * size, (j + 1) * size) for j in range(len(groups)))


def _het_table(
    ordered: Tensor,
    target: Tensor,
    supervised: Tensor,
    position: Tensor | None,
    token: Tensor | None,
    low: int,
    classes: int,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """``[R, h]`` table of hard tokens by row and the number of entries that count."""
    if position is None or token is None or position.numel() == 0 or ordered.numel() == 0:
        return target.new_empty(len(target), 0), torch.zeros((), device=target.device)
    _, batch, time = supervised.shape
    row_time = position - int(options.shift)
    flat = (torch.arange(batch, device=position.device).unsqueeze(1) * time + row_time.clamp(0, time - 1)).flatten()
    wrong = token.flatten() - low
    row = torch.searchsorted(ordered, flat).clamp_max(len(ordered) - 1)
    counts = ((row_time >= 0) & (position < time) & (position >= 0)).flatten() & (ordered[row] == flat)
    counts &= (wrong >= 0) & (wrong < classes) & (wrong != target[row])

    # rank of each entry among those of its row: entries that do not count sort behind the last row
    row = torch.where(counts, row, len(target))
    row, order = row.sort(stable=True)
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    wrong = torch.where(counts, wrong, -1)[order]
    if options.max_rows is not None:
        width = position.shape[1]
    else:
        width = int(torch.where(row < len(target), rank + 1, 0).max())
    table = target.new_full((len(target) + 1, width + 1), -1)  # the last row and column swallow what does not count
    table[row, rank.clamp_max(width)] = wrong
    return table[:-1, :-1].contiguous(), counts.sum()


def raise_out_of_range(label: int, low: int, classes: int) -> NoReturn:
    """The error for a label outside the vocabulary or its range."""
    raise ValueError(f"labels must be ignore_index or in [{low}, {low + classes}), got {label}")


def filled(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor, made on the device: a copy from the host would synchronise, and fail in a CUDA graph."""
    return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])


def _over(value: Tensor, count: Tensor) -> Tensor:
    """``value / count``, 0 where nothing is counted."""
    return torch.where(count > 0, value / torch.where(count > 0, count, 1.0), torch.zeros_like(value))


@dataclass(frozen=True)
class RowPlan:
    """`Rows` with what is needed to turn per-row results into the output, in plain PyTorch.

    `ntpseg.losses.compaction_triton` offers the same with kernels.

    Attributes:
        rows: the compacted rows.
        ntp_share: ``[R]``, weight of the row in the CE of head 0.
        shape: B, T, k.
        shift: 1 where head 0 predicts the next position, else 0.
    """

    rows: Rows
    ntp_share: Tensor
    shape: tuple[int, int, int]
    shift: int

    def results(self, prediction: Tensor, nll: Tensor, margin: Tensor, low: int) -> tuple[Tensor, Tensor, Tensor]:
        """``[R]`` results as ``[B, T, k]``; predictions count from `low`, -1 / 0 / 0 where there is no row."""
        prediction = torch.where(self.rows.index < 0, -1, prediction + low)
        return self._by_target(prediction, -1), self._by_target(nll, 0), self._by_target(margin, 0)

    def gradient(self, d_rows: Tensor) -> Tensor:
        """``[R, D]`` as ``[B, T, k, D]``, zero where there is no row."""
        batch, time, heads = self.shape
        cells, slot = self._slots()
        row = (slot % (batch * time)) * heads + slot // (batch * time)
        d_hidden = d_rows.new_zeros(cells + 1, d_rows.shape[1])
        d_hidden[torch.where(self.rows.index < 0, cells, row)] = d_rows
        return d_hidden[:-1].view(*self.shape, d_rows.shape[1])

    def _slots(self) -> tuple[int, Tensor]:
        """Number of cells and the cell of each row; padding rows land in one cell more, which is cut off."""
        batch, time, heads = self.shape
        cells = heads * batch * time
        return cells, torch.where(self.rows.index < 0, cells, self.rows.index)

    def _by_target(self, values: Tensor, empty: int) -> Tensor:
        batch, time, heads = self.shape
        cells, slot = self._slots()
        flat = values.new_full((cells + 1,), empty)
        flat[slot] = values
        by_row = flat[:-1].view(heads, batch, time)
        moved = values.new_full((batch, time, heads), empty)
        for offset in range(self.shift, min(heads + self.shift, time)):
            j = offset - self.shift
            moved[:, offset:, j] = by_row[j, :, : time - offset]
        return moved
