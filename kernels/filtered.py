"""Gradient filtering, second half: the two products over the live tiles of E only.

Reference: zero the dead tiles of E, then ``d_hidden = diag(scale) E @ weight`` and ``d_weight += E.T @ scaled``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ntpseg.kernels.dialect import narrow, operand
from ntpseg.kernels.live_tiles import LiveTiles
from ntpseg.kernels.table import GemmConfig


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
