"""Rows gathered from the batch into their compact order, and row results scattered back to it.

Reference: ``out[r] = source[index[r]]``, zero where the index is -1; ``logit[r] = (out[r] * weight[target[r]]).sum()``,
with ``anchor = logit * log2(e)`` and ``limit = logit + gap``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED, LOG2E
from ntpseg.kernels.workspace import Anchors


@triton.jit
def row_offsets(index, heads, time, sample_stride, time_stride, head_stride, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Where rows (sample, time, head) begin; a division only where their strides are not one."""
    if WIDE:
        index = index.to(tl.int64)
    else:
        index = index.to(tl.int32)
    if FLAT:
        return index * head_stride
    sample = index // (heads * time)
    step = index // heads - sample * time
    return sample * sample_stride + step * time_stride + index % heads * head_stride


@triton.jit(do_not_specialize=["rows", "heads", "time"])
def gather_rows_kernel(
    source,
    index_ptr,
    out,
    rows,
    width,
    heads,
    time,
    sample_stride,
    time_stride,
    head_stride,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask = row < rows
    index = tl.load(index_ptr + row, mask=row_mask, other=-1)
    if WIDE:
        row = row.to(tl.int64)
    feature_mask = (feature < width)[None, :]
    offsets = row_offsets(index, heads, time, sample_stride, time_stride, head_stride, FLAT, WIDE)
    value = tl.load(source + offsets[:, None] + feature[None, :], mask=(index >= 0)[:, None] & feature_mask, other=0)
    tl.store(out + row[:, None] * width + feature[None, :], value, mask=row_mask[:, None] & feature_mask)


@triton.jit(do_not_specialize=["rows", "heads", "time", "classes"])
def gather_rows_dot_kernel(
    source,
    index_ptr,
    out,
    weight,
    target_ptr,
    logit_ptr,
    anchor_ptr,
    limit_ptr,
    gap,
    rows,
    width,
    heads,
    time,
    sample_stride,
    time_stride,
    head_stride,
    classes,
    weight_stride,
    matrix_stride,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_WEIGHT: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    index = tl.load(index_ptr + row, mask=row_mask, other=-1)
    target = tl.load(target_ptr + row, mask=row_mask, other=-1)
    # a label that is out of range is refused later: it must not be followed until then
    valid = (index >= 0) & (target >= 0) & (target < classes)
    if WIDE_WEIGHT:
        target = target.to(tl.int64)
    else:
        target = target.to(tl.int32)
    weight_row = target * weight_stride
    if PER_HEAD:
        weight_row += (index.to(tl.int32) % heads).to(target.dtype) * matrix_stride
    source_row = row_offsets(index, heads, time, sample_stride, time_stride, head_stride, FLAT, WIDE)
    out_row = row
    if WIDE:
        out_row = row.to(tl.int64)
    out_row = out_row * width
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        feature_mask = (feature < width)[None, :]
        bits = tl.load(
            source + source_row[:, None] + feature[None, :], mask=(index >= 0)[:, None] & feature_mask, other=0
        )
        b = tl.load(weight + weight_row[:, None] + feature[None, :], mask=valid[:, None] & feature_mask, other=0.0)
        tl.store(out + out_row[:, None] + feature[None, :], bits, mask=row_mask[:, None] & feature_mask)
        a = bits.to(weight.dtype.element_ty, bitcast=True)
        total += a.to(tl.float32) * b.to(tl.float32)
    # a row without a target has no logit, whatever it holds
    logit = tl.where(valid, tl.sum(total, 1), 0.0)
    tl.store(logit_ptr + row, logit, mask=row_mask)
    tl.store(anchor_ptr + row, logit * LOG2E, mask=row_mask)
    tl.store(limit_ptr + row, logit + gap, mask=row_mask)


def gather_rows(source: Tensor, index: Tensor) -> Tensor:
    """Rows of `source`, zero rows where the index is -1 (``torch.index_select`` with padding).

    Args:
        source: ``[B, T, k, D]``, whose rows count in this order, or ``[N, D]``; any float dtype and strides, but a copy
            is made where features do not lie side by side.
        index: ``[R]`` integer, contiguous.

    Returns:
        ``[R, D]`` contiguous.
    """
    out = source.new_empty(len(index), source.shape[-1])
    if out.numel() == 0:
        return out
    source, strides, layout = _layout(source, out)
    size, depth = (512, 1024) if INTERPRETED else (4, 1024)
    gather_rows_kernel[(triton.cdiv(len(index), size), triton.cdiv(out.shape[1], depth))](
        _bits(source), index, _bits(out), *out.shape, *strides, **layout, BLOCK_M=size, BLOCK_D=depth, num_warps=4
    )
    return out


def gather_rows_dot(
    source: Tensor, index: Tensor, weight: Tensor, target: Tensor, gap: float
) -> tuple[Tensor, Anchors]:
    """`gather_rows`, and on the way each row's logit of its target, ``(out * weight[target]).sum(1)``, and its anchor.

    Args:
        source: ``[B, T, k, D]``, see `gather_rows`.
        index: ``[R]`` integer, contiguous.
        weight: ``[V, D]`` or, a matrix for each head, ``[k, V, D]``; the same dtype, last dimension contiguous.
        target: ``[R]`` integer, contiguous, class in the head's matrix.
        gap: how far the limit lies above the logit, see `ntpseg.kernels.row_reduce.overflow_gap`.

    Returns:
        ``[R, D]`` contiguous, and the anchors: the logit is 0 where the index or the target is -1 or the target no
        class.
    """
    out = source.new_empty(len(index), source.shape[-1])
    # one allocation each, as in `ntpseg.kernels.workspace`
    logit, anchor, limit = (torch.empty(len(index), dtype=torch.float32, device=source.device) for _ in range(3))
    if out.numel() == 0:
        return out, Anchors(logit.zero_(), anchor.zero_(), limit.fill_(gap))
    source, strides, layout = _layout(source, out)
    size, depth = (512, 1024) if INTERPRETED else (4, 1024)
    gather_rows_dot_kernel[(triton.cdiv(len(index), size),)](
        _bits(source),
        index,
        _bits(out),
        weight,
        target,
        logit,
        anchor,
        limit,
        gap,
        *out.shape,
        *strides,
        weight.shape[-2],
        weight.stride(-2),
        weight.stride(0) if weight.dim() == 3 else 0,
        **layout,
        WIDE_WEIGHT=_reach(weight) >= 1 << 31,
        PER_HEAD=weight.dim() == 3,
        BLOCK_M=size,
        BLOCK_D=depth,
        num_warps=4,
    )
    return out, Anchors(logit, anchor, limit)


def _layout(source: Tensor, out: Tensor) -> tuple[Tensor, tuple[int, ...], dict[str, bool]]:
    """`source` with features side by side; its heads, times and strides; and how its rows are addressed."""
    if source.dim() == 2:
        source = source.unsqueeze(1).unsqueeze(0)
    if source.stride(3) != 1:
        source = source.contiguous()
    _, time, heads, width = source.shape
    try:
        row_stride = source.view(-1, width).stride(0)
    except RuntimeError:
        flat, strides = False, source.stride()[:3]
    else:
        flat, strides = True, (0, 0, row_stride)
    wide = max(_reach(source), out.numel()) >= 1 << 31
    return source, (heads, time, *strides), {"FLAT": flat, "WIDE": wide}


def _reach(x: Tensor) -> int:
    """Entries between the first and the last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _bits(x: Tensor) -> Tensor:
    """For kernels that move numbers: the interpreter rounds what it takes for bf16."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@triton.jit(do_not_specialize=["rows"])
def zero_missing_rows_kernel(
    index_ptr, out, rows, width, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    missing = tl.load(index_ptr + row, mask=row < rows, other=0) < 0
    if WIDE:
        row = row.to(tl.int64)
    zero = tl.zeros((BLOCK_M, BLOCK_D), dtype=out.dtype.element_ty)
    tl.store(out + row[:, None] * width + feature[None, :], zero, mask=missing[:, None] & (feature < width)[None, :])


def zero_missing_rows(out: Tensor, index: Tensor) -> Tensor:
    """Zeros the rows of `out` whose index is negative, writes nothing else, and returns it.

    Args:
        out: ``[N, D]`` contiguous.
        index: ``[N]`` integer, contiguous.
    """
    if out.numel():
        size, depth = (512, 1024) if INTERPRETED else (8, 1024)
        zero_missing_rows_kernel[(triton.cdiv(out.shape[0], size), triton.cdiv(out.shape[1], depth))](
            index,
            _bits(out),
            *out.shape,
            WIDE=out.numel() >= 1 << 31,
            BLOCK_M=size,
            BLOCK_D=depth,
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["cells", "heads", "time", "shift", "class_start"])
def scatter_results_kernel(
    inverse_index_ptr,
    prediction_ptr,
    nll_ptr,
    margin_ptr,
    prediction_out,
    nll_out,
    margin_out,
    cells,
    heads,
    time,
    shift,
    class_start,
    BLOCK_SIZE: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = cell < cells
    head = cell % heads
    back = shift + head  # the row that predicts this position lies so many positions earlier
    has_row = mask & (cell // heads % time >= back)
    row = tl.load(inverse_index_ptr + cell - back * heads, mask=has_row, other=-1)
    valid = row >= 0
    prediction = tl.load(prediction_ptr + row, mask=valid, other=-1)
    tl.store(prediction_out + cell, tl.where(valid & (prediction >= 0), prediction + class_start, -1), mask=mask)
    tl.store(nll_out + cell, tl.load(nll_ptr + row, mask=valid, other=0.0), mask=mask)
    tl.store(margin_out + cell, tl.load(margin_ptr + row, mask=valid, other=0.0), mask=mask)


def scatter_results(
    inverse_index: Tensor,
    prediction: Tensor,
    nll: Tensor,
    margin: Tensor,
    shape: tuple[int, int, int],
    shift: int,
    class_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row results by the position of the predicted token.

    Args:
        inverse_index: ``[B * T * k]`` int32, row of each (sample, time, head), -1 = none.
        prediction: ``[R]`` int64 relative to `class_start`; nll, margin: ``[R]`` fp32.
        shape: B, T, k.
        shift: 1 where a row predicts the next position, else 0.
        class_start: start of the slice of the vocabulary.

    Returns:
        prediction (int64, -1 where there is no row), nll and margin (fp32, 0 there), each ``[B, T, k]``.
    """
    outputs = (
        torch.empty(shape, dtype=torch.int64, device=inverse_index.device),
        torch.empty(shape, dtype=torch.float32, device=inverse_index.device),
        torch.empty(shape, dtype=torch.float32, device=inverse_index.device),
    )
    size = 4096 if INTERPRETED else 512
    scatter_results_kernel[(triton.cdiv(inverse_index.numel(), size),)](
        inverse_index,
        prediction,
        nll,
        margin,
        *outputs,
        inverse_index.numel(),
        shape[2],
        shape[1],
        shift,
        class_start,
        BLOCK_SIZE=size,
        num_warps=4,
    )
    return outputs
