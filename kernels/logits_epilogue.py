"""Row statistics and E from logits that a library product has already written.

Takes the place of the fused product where the operands are fp32: cuBLAS has better products of those. The logits are
read twice, first for the statistics, then, with anchors that cannot overflow any more, for E, which may overwrite them.

Reference: ``E = exp2(z * log2(e) - anchor)``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED, LOG2E, anchored_exp, narrow
from ntpseg.kernels.workspace import Anchors, Partials

BLOCK_CLASSES = 512


@triton.jit(do_not_specialize=["rows", "classes"])
def logits_statistics_kernel(
    z_ptr,
    anchor_ptr,
    limit_ptr,
    sum_ptr,
    max_ptr,
    arg_ptr,
    rows,
    classes,
    z_stride,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    inside = row < rows
    mask = inside[:, None] & (column < classes)[None, :]
    place = row.to(tl.int64)[:, None] * z_stride + column[None, :]
    z = tl.load(z_ptr + place, mask=mask, other=float("-inf"))
    anchor = tl.load(anchor_ptr + row, mask=inside, other=0.0)
    limit = tl.load(limit_ptr + row, mask=inside, other=0.0)
    _, total, top, best = anchored_exp(z, anchor, limit, column)
    part = tl.program_id(1) * rows + row
    tl.store(sum_ptr + part, total, mask=inside)
    tl.store(max_ptr + part, top, mask=inside)
    tl.store(arg_ptr + part, best, mask=inside)


@triton.jit(do_not_specialize=["rows", "classes"])
def logits_exp_kernel(z_ptr, e_ptr, anchor_ptr, rows, classes, z_stride, e_stride, BR: tl.constexpr, BV: tl.constexpr):
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    mask = (row < rows)[:, None] & (column < classes)[None, :]
    z = tl.load(z_ptr + row.to(tl.int64)[:, None] * z_stride + column[None, :], mask=mask, other=float("-inf"))
    anchor = tl.load(anchor_ptr + row, mask=row < rows, other=0.0)
    e = tl.exp2(tl.fma(z, LOG2E, -anchor[:, None]))
    tl.store(
        e_ptr + row.to(tl.int64)[:, None] * e_stride + column[None, :], narrow(e, e_ptr.dtype.element_ty), mask=mask
    )


def logits_statistics(z: Tensor, anchors: Anchors, partials: Partials) -> None:
    """Fills `partials` (blocks of `BLOCK_CLASSES` classes) from fp32 logits ``[R, V]``."""
    rows, classes = z.shape
    size = 64 if INTERPRETED else 8
    logits_statistics_kernel[(triton.cdiv(rows, size), triton.cdiv(classes, BLOCK_CLASSES))](
        z,
        anchors.anchor,
        anchors.limit,
        partials.sum,
        partials.max,
        partials.arg,
        rows,
        classes,
        z.stride(0),
        BR=size,
        BV=BLOCK_CLASSES,
        num_warps=4,
    )


def logits_exp(z: Tensor, anchors: Anchors, e: Tensor) -> None:
    """Writes E ``[R, V]`` from fp32 logits; `e` may be `z` itself."""
    rows, classes = z.shape
    size = 64 if INTERPRETED else 8
    logits_exp_kernel[(triton.cdiv(rows, size), triton.cdiv(classes, BLOCK_CLASSES))](
        z, e, anchors.anchor, rows, classes, z.stride(0), e.stride(0), BR=size, BV=BLOCK_CLASSES, num_warps=4
    )
