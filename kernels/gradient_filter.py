"""Gradient filtering: which tiles of E matter, and the two products over those tiles only.

A tile (row block x vocabulary block of the fused product) is active when one of its probabilities reaches the threshold
or when a target, a negative or a hard token of its rows lies in it. The idea is that of cut cross-entropy
(arXiv 2411.09009, section 4.3); here the tile maxima are already known from the forward product.

Error bound: in each row the logit gradient loses less than ``row_weight * threshold`` per class of a skipped tile, and
in all less than ``row_weight * (probability mass in skipped tiles)``.

Reference: zero the skipped tiles of E, then ``d_hidden = diag(scale) E @ weight`` and ``d_weight += E.T @ scaled``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ntpseg.kernels.gemm_configs import GemmConfig
from ntpseg.kernels.tl_utils import INTERPRETED, LOG2E, ROW_POINTERS, downcast, upcast_if_interpreted
from ntpseg.kernels.workspace import BlockStats, RowStats


@dataclass(frozen=True)
class BlockMask:
    """Block-sparse structure of E, as FlexAttention's ``BlockMask`` has it of a score matrix.

    Attributes:
        BLOCK_M, BLOCK_N: rows and classes of a tile.
        active: ``[row blocks, class blocks]`` int32 flags.
        class_num_blocks, class_indices: per row block the number of its active class blocks, ``[row blocks]`` int32,
            and those, ascending: ``[row blocks, class blocks]`` int32, of which that many are valid.
        row_num_blocks, row_indices: the same, transposed: the active row blocks of each class block.
    """

    BLOCK_M: int
    BLOCK_N: int
    active: Tensor
    class_num_blocks: Tensor
    class_indices: Tensor
    row_num_blocks: Tensor
    row_indices: Tensor

    def classes(self, cut: slice) -> BlockMask:
        """For the product over some classes, which must start with a tile; `class_indices` is left as it is."""
        blocks = slice(cut.start // self.BLOCK_N, -(-cut.stop // self.BLOCK_N))
        return replace(self, row_num_blocks=self.row_num_blocks[blocks], row_indices=self.row_indices[blocks])


@triton.jit(
    do_not_specialize=["rows", "stats_stride", "blocks", "threshold"], do_not_specialize_on_alignment=ROW_POINTERS
)
def mark_probable_kernel(
    row_max_ptr,
    target_logit_ptr,
    nll_ptr,
    target_ptr,
    active_ptr,
    rows,
    stats_stride,
    blocks,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row_block = tl.program_id(0)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < rows
    valid = tl.load(target_ptr + row, mask=row_mask, other=-1) >= 0
    target_logit = tl.load(target_logit_ptr + row, mask=row_mask, other=0.0)
    lse = target_logit + tl.load(nll_ptr + row, mask=row_mask, other=0.0)
    mask = (block < blocks)[:, None] & valid[None, :]
    tile_max = tl.load(row_max_ptr + block[:, None] * stats_stride + row[None, :], mask=mask, other=float("-inf"))
    p = tl.exp2((tile_max - lse[None, :]) * LOG2E)
    # "not below" rather than "at least": a NaN keeps its tile
    active = tl.max(tl.where(mask & ~(p < threshold), 1, 0), 1)
    tl.store(active_ptr + row_block * blocks + block, active, mask=block < blocks)


@triton.jit(do_not_specialize=["rows", "blocks", "columns"], do_not_specialize_on_alignment=ROW_POINTERS)
def mark_tokens_kernel(
    token_ptr,
    target_ptr,
    active_ptr,
    rows,
    blocks,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    row_mask = row < rows
    target = tl.load(target_ptr + row, mask=row_mask, other=-1)
    row_block_ptr = active_ptr + (row // BLOCK_M) * blocks
    one = tl.full((BLOCK_SIZE,), 1, dtype=tl.int32)
    tl.store(row_block_ptr + target // BLOCK_N, one, mask=target >= 0)
    for i in range(columns):
        token = tl.load(token_ptr + row.to(tl.int64) * columns + i, mask=row_mask, other=-1)
        tl.store(row_block_ptr + token // BLOCK_N, one, mask=token >= 0)


@triton.jit(do_not_specialize=["items", "item_stride", "line_stride"])
def active_indices_kernel(
    active_ptr, indices_ptr, num_blocks_ptr, items, item_stride, line_stride, BLOCK_SIZE: tl.constexpr
):
    line = tl.program_id(0)
    count = 0
    for start in range(0, items, BLOCK_SIZE):
        item = start + tl.arange(0, BLOCK_SIZE)
        flag = tl.load(active_ptr + line * line_stride + item * item_stride, mask=item < items, other=0)
        offsets = count + tl.cumsum(flag, 0) - 1
        tl.store(indices_ptr + line * items + offsets, item, mask=flag > 0)
        count += tl.sum(flag, 0)
    tl.store(num_blocks_ptr + line, count)


def create_block_mask(
    block_stats: BlockStats,
    row_stats: RowStats,
    target_logit: Tensor,
    target: Tensor,
    token: Tensor,
    threshold: float,
    BLOCK_M: int,
    BLOCK_N: int,
    local_target: Tensor,
) -> BlockMask:
    """The active tiles of one chunk, without synchronising.

    Args:
        block_stats: maxima per block of `BLOCK_N` classes, see `ntpseg.kernels.row_reduce.row_reduce`.
        row_stats: results of the rows.
        target_logit: ``[R]`` fp32, z_y.
        target: ``[R]`` int64, -1 = padding.
        token: ``[R, K]`` int32, negatives and hard tokens among these classes, -1 = none.
        threshold: least probability that keeps a tile.
        BLOCK_M, BLOCK_N: tile of the fused product.
        local_target: ``[R]`` integer, the target's column among these classes, -1 = elsewhere.
    """
    class_blocks, rows = block_stats.row_max.shape
    row_blocks = triton.cdiv(rows, BLOCK_M)

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=target.device)

    active = empty(row_blocks, class_blocks)
    size = 64 if INTERPRETED else 32
    mark_probable_kernel[(row_blocks, triton.cdiv(class_blocks, size))](
        block_stats.row_max,
        target_logit,
        row_stats.nll,
        target,
        active,
        rows,
        block_stats.row_max.stride(0),
        class_blocks,
        threshold,
        BLOCK_M=BLOCK_M,
        BLOCK_B=size,
        num_warps=4,
    )
    size = 1024 if INTERPRETED else 128
    mark_tokens_kernel[(triton.cdiv(rows, size),)](
        token,
        local_target,
        active,
        rows,
        class_blocks,
        token.shape[1],
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_SIZE=size,
        num_warps=4,
    )
    class_num_blocks, class_indices = empty(row_blocks), empty(row_blocks, class_blocks)
    row_num_blocks, row_indices = empty(class_blocks), empty(class_blocks, row_blocks)
    active_indices_kernel[(row_blocks,)](
        active, class_indices, class_num_blocks, class_blocks, 1, class_blocks, BLOCK_SIZE=256, num_warps=4
    )
    active_indices_kernel[(class_blocks,)](
        active, row_indices, row_num_blocks, row_blocks, class_blocks, 1, BLOCK_SIZE=256, num_warps=4
    )
    return BlockMask(BLOCK_M, BLOCK_N, active, class_num_blocks, class_indices, row_num_blocks, row_indices)


@triton.jit(
    do_not_specialize=["rows", "classes", "blocks", "width_8", "e_stride_8", "weight_stride_8", "out_stride_8"],
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def filtered_d_hidden_kernel(
    e,
    weight,
    out_ptr,
    indices_ptr,
    num_blocks_ptr,
    rows,
    classes,
    blocks,
    width_8,
    e_stride_8,
    weight_stride_8,
    out_stride_8,
    scale_ptr,
    index_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CLASSES: tl.constexpr,
    TMA: tl.constexpr,
):
    row_block = tl.program_id(1)
    row_0 = row_block * BLOCK_M
    feature_0 = tl.program_id(0) * BLOCK_N
    row = row_0 + tl.arange(0, BLOCK_M)
    feature = feature_0 + tl.arange(0, BLOCK_N)
    width = width_8 * 8
    steps: tl.constexpr = TILE_CLASSES // BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # rows past the end read the last one: their results are never stored
    e_row = tl.minimum(row, rows - 1).to(tl.int64) * (e_stride_8 * 8)
    for i in range(tl.load(num_blocks_ptr + row_block) * steps):
        class_0 = tl.load(indices_ptr + row_block * blocks + i // steps) * TILE_CLASSES + (i % steps) * BLOCK_K
        if TMA:
            a = e.load([row_0, class_0])
            b = weight.load([class_0, feature_0])
        else:
            column = class_0 + tl.arange(0, BLOCK_K)
            class_mask = column < classes
            a = tl.load(e + e_row[:, None] + column[None, :], mask=class_mask[None, :], other=0.0)
            b_row = column.to(tl.int64)[:, None] * (weight_stride_8 * 8)
            b_mask = class_mask[:, None] & (feature < width)[None, :]
            b = tl.load(weight + b_row + feature[None, :], mask=b_mask, other=0.0)
        total = tl.dot(upcast_if_interpreted(a), upcast_if_interpreted(b), total, input_precision="ieee")
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    # a row without weight is zero whatever its E holds
    total = tl.where(scale[:, None] == 0.0, 0.0, total * scale[:, None])
    if index_ptr is None:
        place = row
    else:
        place = tl.load(index_ptr + row, mask=row < rows, other=-1)
    offsets = place.to(tl.int64)[:, None] * (out_stride_8 * 8) + feature[None, :]
    mask = ((row < rows) & (place >= 0))[:, None] & (feature < width)[None, :]
    tl.store(out_ptr + offsets, downcast(total, out_ptr.dtype.element_ty), mask=mask)


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
    indices_ptr,
    num_blocks_ptr,
    rows,
    classes,
    blocks,
    width_8,
    e_stride_8,
    scaled_stride_8,
    out_stride_8,
    accumulate,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CLASSES: tl.constexpr,
    TMA: tl.constexpr,
):
    feature_0 = tl.program_id(0) * BLOCK_N
    class_0 = tl.program_id(1) * BLOCK_M
    class_block = class_0 // TILE_CLASSES
    column = class_0 + tl.arange(0, BLOCK_M)
    feature = feature_0 + tl.arange(0, BLOCK_N)
    width = width_8 * 8
    num_blocks = tl.load(num_blocks_ptr + class_block)
    # classes without an active tile: nothing to add, but a sum that starts here must start at zero
    if (num_blocks > 0) | (accumulate == 0):
        steps: tl.constexpr = TILE_ROWS // BLOCK_K
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i in range(num_blocks * steps):
            row_0 = tl.load(indices_ptr + class_block * blocks + i // steps) * TILE_ROWS + (i % steps) * BLOCK_K
            if TMA:
                a = e.load([row_0, class_0])
                b = scaled.load([row_0, feature_0])
            else:
                row = row_0 + tl.arange(0, BLOCK_K)
                row_mask = row < rows
                a_row = row.to(tl.int64)[:, None] * (e_stride_8 * 8)
                a_mask = row_mask[:, None] & (column < classes)[None, :]
                a = tl.load(e + a_row + column[None, :], mask=a_mask, other=0.0)
                b_row = row.to(tl.int64)[:, None] * (scaled_stride_8 * 8)
                b_mask = row_mask[:, None] & (feature < width)[None, :]
                b = tl.load(scaled + b_row + feature[None, :], mask=b_mask, other=0.0)
            total = tl.dot(upcast_if_interpreted(a).T, upcast_if_interpreted(b), total, input_precision="ieee")
        offsets = column.to(tl.int64)[:, None] * (out_stride_8 * 8) + feature[None, :]
        mask = (column < classes)[:, None] & (feature < width)[None, :]
        if accumulate != 0:
            total += tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, downcast(total, out_ptr.dtype.element_ty), mask=mask)


def filtered_d_hidden(
    e: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    block_mask: BlockMask,
    config: GemmConfig,
    index: Tensor | None = None,
) -> None:
    """``out[index] = diag(scale) E @ weight`` over the active tiles.

    Args:
        e: ``[R, V]``, 16-byte aligned rows.
        weight: ``[V, D]``, the same.
        scale: ``[R]`` fp32.
        out: ``[N, D]``; the other rows are left as they are.
        block_mask: its row tile must equal ``config.BLOCK_M``.
        config: M, N, K = rows, features, classes.
        index: ``[R]`` integer, contiguous, row of `out` that each goes to, -1 = none; None keeps their order, N = R.
    """
    tile = [config.BLOCK_M, config.BLOCK_K]
    indices, num_blocks = block_mask.class_indices, block_mask.class_num_blocks
    _launch(
        filtered_d_hidden_kernel,
        (e, tile),
        weight,
        out,
        e.shape[0],
        (indices, num_blocks),
        (scale, index),
        block_mask,
        config,
    )


def filtered_d_weight(
    e: Tensor, scaled: Tensor, out: Tensor, block_mask: BlockMask, config: GemmConfig, *, accumulate: bool
) -> None:
    """``out (+)= E.T @ scaled`` over the active tiles.

    Args:
        e: ``[R, V]``, 16-byte aligned rows.
        scaled: ``[R, D]``, the same.
        out: ``[V, D]``; added to if `accumulate` (then it should be fp32), else overwritten.
        block_mask: its class tile must be a multiple of ``config.BLOCK_M``.
        config: M, N, K = classes, features, rows.
        accumulate: whether to add.
    """
    tile = [config.BLOCK_K, config.BLOCK_M]
    indices, num_blocks = block_mask.row_indices, block_mask.row_num_blocks
    _launch(
        filtered_d_weight_kernel,
        (e, tile),
        scaled,
        out,
        e.shape[1],
        (indices, num_blocks),
        (int(accumulate),),
        block_mask,
        config,
    )


def _launch(
    kernel: Any,
    left: tuple[Tensor, list[int]],
    right: Tensor,
    out: Tensor,
    height: int,
    active: tuple[Tensor, Tensor],
    extra: tuple[Tensor | int | None, ...],
    block_mask: BlockMask,
    config: GemmConfig,
) -> None:
    """What both products share: `left` is E and the tile of it that a step reads, `height` the rows of the product,
    `extra` the kernel's own arguments."""
    e, tile = left
    indices, num_blocks = active
    operands: list[object] = [e, right]
    if config.TMA:
        operands = [
            TensorDescriptor.from_tensor(e, tile),
            TensorDescriptor.from_tensor(right, [config.BLOCK_K, config.BLOCK_N]),
        ]
    rows, classes = e.shape
    width = out.shape[1]
    kernel[(triton.cdiv(width, config.BLOCK_N), triton.cdiv(height, config.BLOCK_M))](
        *operands,
        out,
        indices,
        num_blocks,
        rows,
        classes,
        indices.shape[1],
        width // 8,
        e.stride(0) // 8,
        right.stride(0) // 8,
        out.stride(0) // 8,
        *extra,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        TILE_ROWS=block_mask.BLOCK_M,
        TILE_CLASSES=block_mask.BLOCK_N,
        TMA=config.TMA,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
