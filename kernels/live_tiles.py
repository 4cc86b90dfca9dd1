"""Gradient filtering, first half: which tiles of E matter.

A tile (row block x vocabulary block of the fused product) is live when one of its probabilities reaches the threshold
or when a target, a negative or a hard token of its rows lies in it. The idea is that of cut cross-entropy
(arXiv 2411.09009, section 4.3); here the tile maxima are already known from the forward product.

Error bound: in each row the logit gradient loses less than ``share * threshold`` per class of a dead tile, and in all
less than ``share * (probability mass in dead tiles)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.dialect import INTERPRETED, LOG2E
from ntpseg.kernels.partials import Partials, RowStates


@dataclass(frozen=True)
class LiveTiles:
    """Block-sparse structure of E.

    Attributes:
        rows, classes: size of a tile.
        live: ``[row blocks, class blocks]`` int32 flags.
        by_row, row_count: per row block its live class blocks, ascending, ``[row blocks, class blocks]`` int32 of which
            the first ``row_count`` are valid.
        by_class, class_count: the same, transposed.
    """

    rows: int
    classes: int
    live: Tensor
    by_row: Tensor
    row_count: Tensor
    by_class: Tensor
    class_count: Tensor

    def part(self, cut: slice) -> LiveTiles:
        """For the product over some classes, which must start with a tile; `by_row` is left as it is."""
        lines = slice(cut.start // self.classes, -(-cut.stop // self.classes))
        return replace(self, by_class=self.by_class[lines], class_count=self.class_count[lines])


@triton.jit(do_not_specialize=["rows", "blocks", "threshold"])
def mark_probable_kernel(
    max_ptr, logit_ptr, nll_ptr, target_ptr, live_ptr, rows, blocks, threshold, BR: tl.constexpr, BLOCKS: tl.constexpr
):
    row_block = tl.program_id(0)
    row = row_block * BR + tl.arange(0, BR)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    real = tl.load(target_ptr + row, mask=row < rows, other=-1) >= 0
    lse = tl.load(logit_ptr + row, mask=row < rows, other=0.0) + tl.load(nll_ptr + row, mask=row < rows, other=0.0)
    mask = (block < blocks)[:, None] & real[None, :]
    top = tl.load(max_ptr + block[:, None] * rows + row[None, :], mask=mask, other=float("-inf"))
    p = tl.exp2((top - lse[None, :]) * LOG2E)
    # "not below" rather than "at least": a NaN keeps its tile
    live = tl.max(tl.where(mask & ~(p < threshold), 1, 0), 1)
    tl.store(live_ptr + row_block * blocks + block, live, mask=block < blocks)


@triton.jit(do_not_specialize=["rows", "blocks", "columns"])
def mark_touched_kernel(
    token_ptr, target_ptr, live_ptr, rows, blocks, columns, BR: tl.constexpr, BV: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    target = tl.load(target_ptr + row, mask=row < rows, other=-1)
    line = live_ptr + (row // BR) * blocks
    one = tl.full((SIZE,), 1, dtype=tl.int32)
    tl.store(line + target // BV, one, mask=target >= 0)
    for i in range(columns):
        token = tl.load(token_ptr + row.to(tl.int64) * columns + i, mask=row < rows, other=-1)
        tl.store(line + token // BV, one, mask=token >= 0)


@triton.jit(do_not_specialize=["items", "item_stride", "line_stride"])
def list_live_kernel(live_ptr, list_ptr, count_ptr, items, item_stride, line_stride, SIZE: tl.constexpr):
    line = tl.program_id(0)
    found = 0
    for start in range(0, items, SIZE):
        item = start + tl.arange(0, SIZE)
        flag = tl.load(live_ptr + line * line_stride + item * item_stride, mask=item < items, other=0)
        place = found + tl.cumsum(flag, 0) - 1
        tl.store(list_ptr + line * items + place, item, mask=flag > 0)
        found += tl.sum(flag, 0)
    tl.store(count_ptr + line, found)


def live_tiles(
    partials: Partials,
    states: RowStates,
    logit: Tensor,
    target: Tensor,
    token: Tensor,
    threshold: float,
    rows: int,
    classes: int,
    own_target: Tensor,
) -> LiveTiles:
    """The live tiles of one chunk, without synchronising.

    Args:
        partials: maxima per block of `classes` classes.
        states: results of the rows.
        logit: ``[R]`` fp32, z_y.
        target: ``[R]`` int64, -1 = padding.
        token: ``[R, K]`` int32, touched tokens among these classes, -1 = none.
        threshold: least probability that keeps a tile.
        rows, classes: tile of the fused product.
        own_target: ``[R]`` integer, the target's column among these classes, -1 = elsewhere.
    """
    blocks, count = partials.max.shape
    device = target.device
    lines = triton.cdiv(count, rows)
    live = torch.empty(lines, blocks, dtype=torch.int32, device=device)
    size = 64 if INTERPRETED else 32
    mark_probable_kernel[(lines, triton.cdiv(blocks, size))](
        partials.max,
        logit,
        states.nll,
        target,
        live,
        count,
        blocks,
        threshold,
        BR=rows,
        BLOCKS=size,
        num_warps=4,
    )
    step = 1024 if INTERPRETED else 128
    mark_touched_kernel[(triton.cdiv(count, step),)](
        token, own_target, live, count, blocks, token.shape[1], BR=rows, BV=classes, SIZE=step, num_warps=4
    )
    by_row = torch.empty(lines, blocks, dtype=torch.int32, device=device)
    by_class = torch.empty(blocks, lines, dtype=torch.int32, device=device)
    row_count = torch.empty(lines, dtype=torch.int32, device=device)
    class_count = torch.empty(blocks, dtype=torch.int32, device=device)
    list_live_kernel[(lines,)](live, by_row, row_count, blocks, 1, blocks, SIZE=256, num_warps=4)
    list_live_kernel[(blocks,)](live, by_class, class_count, lines, blocks, 1, SIZE=256, num_warps=4)
    return LiveTiles(rows, classes, live, by_row, row_count, by_class, class_count)
