"""Rows between their compact order and the places of the batch.

Reference: ``out[r] = source[index[r]]``, zero where the index is -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED


@triton.jit(do_not_specialize=["rows", "heads", "time"])
def take_rows_kernel(
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
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * BD + tl.arange(0, BD)
    index = tl.load(index_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    columns = (feature < width)[None, :]
    place = index // heads // time * sample_stride + index // heads % time * time_stride + index % heads * head_stride
    value = tl.load(source + place[:, None] + feature[None, :], mask=(index >= 0)[:, None] & columns, other=0)
    tl.store(out + row[:, None] * width + feature[None, :], value, mask=(row < rows)[:, None] & columns)


def take_rows(source: Tensor, index: Tensor) -> Tensor:
    """Rows of `source`, zero rows where the index is -1.

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
    take_rows_kernel[(triton.cdiv(rows, size), triton.cdiv(width, depth))](
        bits[0],
        index,
        bits[1],
        rows,
        width,
        source.shape[2],
        source.shape[1],
        *source.stride()[:3],
        ROWS=size,
        BD=depth,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["places", "heads", "time", "shift", "low"])
def place_results_kernel(
    slot_ptr,
    prediction_ptr,
    nll_ptr,
    margin_ptr,
    prediction_out,
    nll_out,
    margin_out,
    places,
    heads,
    time,
    shift,
    low,
    SIZE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < places
    head = place % heads
    back = shift + head  # the row that predicts this position lies so many positions earlier
    there = inside & (place // heads % time >= back)
    slot = tl.load(slot_ptr + place - back * heads, mask=there, other=-1)
    real = slot >= 0
    prediction = tl.load(prediction_ptr + slot, mask=real, other=-1)
    tl.store(prediction_out + place, tl.where(real & (prediction >= 0), prediction + low, -1), mask=inside)
    tl.store(nll_out + place, tl.load(nll_ptr + slot, mask=real, other=0.0), mask=inside)
    tl.store(margin_out + place, tl.load(margin_ptr + slot, mask=real, other=0.0), mask=inside)


def place_results(
    slot: Tensor, prediction: Tensor, nll: Tensor, margin: Tensor, shape: tuple[int, int, int], shift: int, low: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row results by the position of the predicted token.

    Args:
        slot: ``[B * T * k]`` int32, row of each (sample, time, head), -1 = none.
        prediction: ``[R]`` int64 relative to `low`; nll, margin: ``[R]`` fp32.
        shape: B, T, k.
        shift: 1 where a row predicts the next position, else 0.
        low: start of the slice of the vocabulary.

    Returns:
        prediction (int64, -1 where there is no row), nll and margin (fp32, 0 there), each ``[B, T, k]``.
    """
    outputs = (
        torch.empty(shape, dtype=torch.int64, device=slot.device),
        torch.empty(shape, dtype=torch.float32, device=slot.device),
        torch.empty(shape, dtype=torch.float32, device=slot.device),
    )
    size = 4096 if INTERPRETED else 512
    place_results_kernel[(triton.cdiv(slot.numel(), size),)](
        slot,
        prediction,
        nll,
        margin,
        *outputs,
        slot.numel(),
        shape[2],
        shape[1],
        shift,
        low,
        SIZE=size,
        num_warps=4,
    )
    return outputs
