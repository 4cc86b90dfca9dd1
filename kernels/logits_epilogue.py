"""Row statistics and E from logits that a library product has already written.

Takes the place of the fused product where the operands are fp32: cuBLAS has better products of those. The logits are
read twice, first for the statistics, then, with anchors that cannot overflow any more, for E, which may overwrite them.

Reference: ``E = exp2(z * log2(e) - anchor)``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED, LOG2E, ROW_POINTERS, anchored_exp, downcast
from ntpseg.kernels.workspace import Anchors, BlockStats

LOGITS_BLOCK_N = 512


@triton.jit(do_not_specialize=["rows", "classes"], do_not_specialize_on_alignment=ROW_POINTERS)
def logits_stats_kernel(
    z_ptr,
    anchor_ptr,
    limit_ptr,
    row_sum_ptr,
    row_max_ptr,
    argmax_ptr,
    rows,
    classes,
    z_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    mask = row_mask[:, None] & (column < classes)[None, :]
    offsets = row.to(tl.int64)[:, None] * z_stride + column[None, :]
    z = tl.load(z_ptr + offsets, mask=mask, other=float("-inf"))
    anchor = tl.load(anchor_ptr + row, mask=row_mask, other=0.0)
    limit = tl.load(limit_ptr + row, mask=row_mask, other=0.0)
    _, row_sum, row_max, argmax = anchored_exp(z, anchor, limit, column)
    block_offsets = tl.program_id(1) * rows + row
    tl.store(row_sum_ptr + block_offsets, row_sum, mask=row_mask)
    tl.store(row_max_ptr + block_offsets, row_max, mask=row_mask)
    tl.store(argmax_ptr + block_offsets, argmax, mask=row_mask)


@triton.jit(do_not_specialize=["rows", "classes"], do_not_specialize_on_alignment=ROW_POINTERS)
def logits_exp_kernel(
    z_ptr, e_ptr, anchor_ptr, rows, classes, z_stride, e_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < classes)[None, :]
    z = tl.load(z_ptr + row.to(tl.int64)[:, None] * z_stride + column[None, :], mask=mask, other=float("-inf"))
    anchor = tl.load(anchor_ptr + row, mask=row < rows, other=0.0)
    e = tl.exp2(tl.fma(z, LOG2E, -anchor[:, None]))
    tl.store(
        e_ptr + row.to(tl.int64)[:, None] * e_stride + column[None, :], downcast(e, e_ptr.dtype.element_ty), mask=mask
    )


def logits_stats(z: Tensor, anchors: Anchors, block_stats: BlockStats) -> None:
    """Fills `block_stats` (blocks of `LOGITS_BLOCK_N` classes) from fp32 logits ``[R, V]``."""
    rows, classes = z.shape
    size = 64 if INTERPRETED else 8
    logits_stats_kernel[(triton.cdiv(rows, size), triton.cdiv(classes, LOGITS_BLOCK_N))](
        z,
        anchors.anchor,
        anchors.limit,
        block_stats.row_sum,
        block_stats.row_max,
        block_stats.argmax,
        rows,
        classes,
        z.stride(0),
        BLOCK_M=size,
        BLOCK_N=LOGITS_BLOCK_N,
        num_warps=4,
    )


def logits_exp(z: Tensor, anchors: Anchors, e: Tensor) -> None:
    """Writes E ``[R, V]`` from fp32 logits; `e` may be `z` itself."""
    rows, classes = z.shape
    size = 64 if INTERPRETED else 8
    logits_exp_kernel[(triton.cdiv(rows, size), triton.cdiv(classes, LOGITS_BLOCK_N))](
        z, e, anchors.anchor, rows, classes, z.stride(0), e.stride(0), BLOCK_M=size, BLOCK_N=LOGITS_BLOCK_N, num_warps=4
    )
