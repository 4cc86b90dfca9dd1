"""Rows gathered from the batch into their compact order, and row results scattered back to it.

Reference: ``out[r] = source[index[r]]``, zero where the index is -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED


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
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    index = tl.load(index_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    feature_mask = (feature < width)[None, :]
    offsets = index // heads // time * sample_stride + index // heads % time * time_stride + index % heads * head_stride
    value = tl.load(source + offsets[:, None] + feature[None, :], mask=(index >= 0)[:, None] & feature_mask, other=0)
    tl.store(out + row[:, None] * width + feature[None, :], value, mask=(row < rows)[:, None] & feature_mask)


def gather_rows(source: Tensor, index: Tensor) -> Tensor:
    """Rows of `source`, zero rows where the index is -1 (``torch.index_select`` with padding).

    Args:
        source: ``[B, T, k, D]``, whose rows count in this order, or ``[N, D]``; any float dtype and strides, but a copy
            is made where features do not lie side by side.
        index: ``[R]`` integer, contiguous.

    Returns:
        ``[R, D]`` contiguous.
    """
    rows, width = len(index), source.shape[-1]
    out = source.new_empty(rows, width)
    if out.numel() == 0:
        return out
    if source.dim() == 2:
        source = source.unsqueeze(1).unsqueeze(0)
    if source.stride(3) != 1:
        source = source.contiguous()
    # nothing is computed; and the interpreter rounds what it takes for bf16 numbers
    bits = (source.view(torch.int16), out.view(torch.int16)) if out.dtype == torch.bfloat16 else (source, out)
    size, depth = (512, 1024) if INTERPRETED else (4, 1024)
    gather_rows_kernel[(triton.cdiv(rows, size), triton.cdiv(width, depth))](
        bits[0],
        index,
        bits[1],
        rows,
        width,
        source.shape[2],
        source.shape[1],
        *source.stride()[:3],
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
