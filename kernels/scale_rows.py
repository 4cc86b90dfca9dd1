"""Copies scaled row by row, and a tensor scaled in place by one number that lies on the device.

Reference: ``out[index] = (source.float() * scale[:, None] * factor).to(out.dtype)``, and
``out = (out.float() * factor).to(out.dtype)``. PyTorch would round the factor to the dtype of `out` first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED, ROW_POINTERS, downcast, upcast_if_interpreted


@triton.jit(
    do_not_specialize=["rows", "factor"],
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def scale_rows_kernel(
    source,
    scale_ptr,
    index_ptr,
    out,
    rows,
    width,
    source_stride,
    out_stride,
    factor,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = row < rows
    if index_ptr is None:
        place = row
    else:
        place = tl.load(index_ptr + row, mask=row_mask, other=-1).to(tl.int32)
        row_mask = row_mask & (place >= 0)
    scale = tl.load(scale_ptr + row, mask=row_mask, other=0.0) * factor
    if WIDE:
        row, place = row.to(tl.int64), place.to(tl.int64)
    mask = row_mask[:, None] & (feature < width)[None, :]
    value = tl.load(source + row[:, None] * source_stride + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    # a row without weight is zero whatever its source holds
    value = tl.where(scale[:, None] == 0.0, 0.0, value * scale[:, None])
    tl.store(out + place[:, None] * out_stride + feature[None, :], downcast(value, out.dtype.element_ty), mask=mask)


def scale_rows(source: Tensor, scale: Tensor, out: Tensor, factor: float = 1.0, index: Tensor | None = None) -> Tensor:
    """``out[index[r]] = source[r] * scale[r] * factor``.

    Args:
        source: ``[R, D]``, last dimension contiguous.
        scale: ``[R]`` fp32.
        out: ``[N, D]``, last dimension contiguous, any float dtype; the other rows are left as they are.
        factor: applied to every row.
        index: ``[R]`` integer, contiguous, row of `out` that each goes to, -1 = none; None keeps their order, N = R.

    Returns:
        `out`.
    """
    rows, width = source.shape
    if source.numel() == 0:
        return out
    size, depth = (128, 1024) if INTERPRETED else (4, 1024)
    scale_rows_kernel[(triton.cdiv(rows, size), triton.cdiv(width, depth))](
        source,
        scale,
        index,
        out,
        rows,
        width,
        source.stride(0),
        out.stride(0),
        factor,
        WIDE=max(rows * source.stride(0), out.shape[0] * out.stride(0)) >= 1 << 31,
        BLOCK_M=size,
        BLOCK_D=depth,
        num_warps=4,
    )
    return out


@triton.jit
def scale_kernel(out, factor_ptr, entries, BLOCK_SIZE: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        value = upcast_if_interpreted(tl.load(out + offsets, mask=offsets < entries, other=0.0)).to(tl.float32)
        tl.store(out + offsets, downcast(value * factor, out.dtype.element_ty), mask=offsets < entries)


def scale_(out: Tensor, factor: Tensor) -> Tensor:
    """Multiplies `out`, contiguous, by `factor`, 0-dim fp32, and returns it; a factor of one costs no pass over it."""
    if out.numel():
        size = 1 << 16 if INTERPRETED else 8192
        scale_kernel[(triton.cdiv(out.numel(), size),)](out, factor, out.numel(), BLOCK_SIZE=size, num_warps=8)
    return out
