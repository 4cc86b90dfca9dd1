"""Gradient filtering: which tiles of E matter, and the two products over those tiles only.

A tile (row block x vocabulary block of the fused product) is live when one of its probabilities reaches the threshold
or when a target, a negative or a hard token of its rows lies in it. The idea is that of cut cross-entropy
(arXiv 2411.09009, section 4.3); here the tile maxima are already known from the forward product.

Error bound: in each row the logit gradient loses less than ``row_weight * threshold`` per class of a dead tile, and in
all less than ``row_weight * (probability mass in dead tiles)``.

Reference: zero the dead tiles of E, then ``d_hidden = diag(scale) E @ weight`` and ``d_weight += E.T @ scaled``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ntpseg.kernels.gemm_configs import GemmConfig
from ntpseg.kernels.tl_utils import INTERPRETED, LOG2E, narrow, operand
from ntpseg.kernels.workspace import Partials, RowStates


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


@triton.jit(do_not_specialize=["rows", "classes", "blocks", "width_8", "e_stride_8", "weight_stride_8", "out_stride_8"])
def filtered_d_hidden_kernel(
    e,
    weight,
    scale_ptr,
    out_ptr,
    list_ptr,
    count_ptr,
    rows,
    classes,
    blocks,
    width_8,
    e_stride_8,
    weight_stride_8,
    out_stride_8,
    BR: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    TILE_CLASSES: tl.constexpr,
    TMA: tl.constexpr,
):
    row_block = tl.program_id(1)
    row_0 = row_block * BR
    feature_0 = tl.program_id(0) * BF
    row = row_0 + tl.arange(0, BR)
    feature = feature_0 + tl.arange(0, BF)
    width = width_8 * 8
    steps: tl.constexpr = TILE_CLASSES // BK
    total = tl.zeros((BR, BF), dtype=tl.float32)
    e_row = tl.minimum(row, rows - 1).to(tl.int64) * (e_stride_8 * 8)
    for i in range(tl.load(count_ptr + row_block) * steps):
        class_0 = tl.load(list_ptr + row_block * blocks + i // steps) * TILE_CLASSES + (i % steps) * BK
        if TMA:
            a = e.load([row_0, class_0])
            b = weight.load([class_0, feature_0])
        else:
            column = class_0 + tl.arange(0, BK)
            inside = column < classes
            a = tl.load(e + e_row[:, None] + column[None, :], mask=inside[None, :], other=0.0)
            b_row = column.to(tl.int64)[:, None] * (weight_stride_8 * 8)
            b = tl.load(weight + b_row + feature[None, :], mask=inside[:, None] & (feature < width)[None, :], other=0.0)
        total = tl.dot(operand(a), operand(b), total, input_precision="ieee")
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    total = tl.where(scale[:, None] == 0.0, 0.0, total * scale[:, None])
    place = row.to(tl.int64)[:, None] * (out_stride_8 * 8) + feature[None, :]
    mask = (row < rows)[:, None] & (feature < width)[None, :]
    tl.store(out_ptr + place, narrow(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "rows",
        "classes",
        "blocks",
        "width_8",
        "e_stride_8",
        "scaled_stride_8",
        "out_stride_8",
        "accumulate",
    ]
)
def filtered_d_weight_kernel(
    e,
    scaled,
    out_ptr,
    list_ptr,
    count_ptr,
    rows,
    classes,
    blocks,
    width_8,
    e_stride_8,
    scaled_stride_8,
    out_stride_8,
    accumulate,
    BC: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CLASSES: tl.constexpr,
    TMA: tl.constexpr,
):
    feature_0 = tl.program_id(0) * BF
    class_0 = tl.program_id(1) * BC
    class_block = class_0 // TILE_CLASSES
    column = class_0 + tl.arange(0, BC)
    feature = feature_0 + tl.arange(0, BF)
    width = width_8 * 8
    count = tl.load(count_ptr + class_block)
    if (count > 0) | (accumulate == 0):
        steps: tl.constexpr = TILE_ROWS // BK
        total = tl.zeros((BC, BF), dtype=tl.float32)
        for i in range(count * steps):
            row_0 = tl.load(list_ptr + class_block * blocks + i // steps) * TILE_ROWS + (i % steps) * BK
            if TMA:
                a = e.load([row_0, class_0])
                b = scaled.load([row_0, feature_0])
            else:
                row = row_0 + tl.arange(0, BK)
                inside = row < rows
                a_row = row.to(tl.int64)[:, None] * (e_stride_8 * 8)
                a = tl.load(e + a_row + column[None, :], mask=inside[:, None] & (column < classes)[None, :], other=0.0)
                b_row = row.to(tl.int64)[:, None] * (scaled_stride_8 * 8)
                b = tl.load(
                    scaled + b_row + feature[None, :], mask=inside[:, None] & (feature < width)[None, :], other=0.0
                )
            total = tl.dot(operand(a).T, operand(b), total, input_precision="ieee")
        place = column.to(tl.int64)[:, None] * (out_stride_8 * 8) + feature[None, :]
        mask = (column < classes)[:, None] & (feature < width)[None, :]
        if accumulate != 0:
            total += tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, narrow(total, out_ptr.dtype.element_ty), mask=mask)


def filtered_d_hidden(
    e: Tensor, weight: Tensor, scale: Tensor, out: Tensor, live: LiveTiles, config: GemmConfig
) -> None:
    """``out = diag(scale) E @ weight`` over the live tiles.

    Args:
        e: ``[R, V]``, 16-byte aligned rows.
        weight: ``[V, D]``, the same.
        scale: ``[R]`` fp32.
        out: ``[R, D]``, overwritten.
        live: structure; its row tile must equal ``config.rows``.
        config: rows x features (`classes`) x classes (`depth`).
    """
    rows, classes = e.shape
    width = weight.shape[1]
    operands: list[object] = [e, weight]
    if config.tma:
        operands = [
            TensorDescriptor.from_tensor(e, [config.rows, config.depth]),
            TensorDescriptor.from_tensor(weight, [config.depth, config.classes]),
        ]
    filtered_d_hidden_kernel[(triton.cdiv(width, config.classes), triton.cdiv(rows, config.rows))](
        *operands,
        scale,
        out,
        live.by_row,
        live.row_count,
        rows,
        classes,
        live.by_row.shape[1],
        width // 8,
        e.stride(0) // 8,
        weight.stride(0) // 8,
        out.stride(0) // 8,
        BR=config.rows,
        BF=config.classes,
        BK=config.depth,
        TILE_CLASSES=live.classes,
        TMA=config.tma,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def filtered_d_weight(
    e: Tensor, scaled: Tensor, out: Tensor, live: LiveTiles, config: GemmConfig, *, accumulate: bool
) -> None:
    """``out (+)= E.T @ scaled`` over the live tiles.

    Args:
        e: ``[R, V]``, 16-byte aligned rows.
        scaled: ``[R, D]``, the same.
        out: ``[V, D]``; added to if `accumulate` (then it should be fp32), else overwritten.
        live: structure; its class tile must be a multiple of ``config.rows``.
        config: classes (`rows`) x features (`classes`) x rows (`depth`).
        accumulate: whether to add.
    """
    rows, classes = e.shape
    width = scaled.shape[1]
    operands: list[object] = [e, scaled]
    if config.tma:
        operands = [
            TensorDescriptor.from_tensor(e, [config.depth, config.rows]),
            TensorDescriptor.from_tensor(scaled, [config.depth, config.classes]),
        ]
    filtered_d_weight_kernel[(triton.cdiv(width, config.classes), triton.cdiv(classes, config.rows))](
        *operands,
        out,
        live.by_class,
        live.class_count,
        rows,
        classes,
        live.by_class.shape[1],
        width // 8,
        e.stride(0) // 8,
        scaled.stride(0) // 8,
        out.stride(0) // 8,
        int(accumulate),
        BC=config.rows,
        BF=config.classes,
        BK=config.depth,
        TILE_ROWS=live.rows,
        TILE_CLASSES=live.classes,
        TMA=config.tma,
        num_warps=config.warps,
        num_stages=config.stages,
    )
