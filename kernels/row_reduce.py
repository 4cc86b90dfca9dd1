"""Row statistics of all vocabulary blocks reduced to row results, and the decision whose E must be recomputed.

Reference: ``nll = logsumexp(z) - z_y``, ``margin = max z - z_y``, ``prediction = argmax z``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import FAR_ANCHOR, INT32_MAX, INTERPRETED, LN2, LOG2E, ROW_POINTERS
from ntpseg.kernels.workspace import Anchors, BlockStats, LossWeights, RowStats

# Above exp(48) the smallest row scale would leave the normal range of bf16; float16 itself ends at exp(11).
_LIMIT = {torch.float16: 10.0}
_DEFAULT_LIMIT = 48.0


def overflow_gap(dtype: torch.dtype) -> float:
    """``max z - z_y`` above which a row of E in this dtype is recomputed with another anchor."""
    return _LIMIT.get(dtype, _DEFAULT_LIMIT)


@triton.jit(
    do_not_specialize=["rows", "stats_stride", "blocks", "num_hard", "classes"],
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def row_reduce_kernel(
    row_sum_ptr,
    row_max_ptr,
    argmax_ptr,
    target_logit_ptr,
    anchor_ptr,
    limit_ptr,
    target_ptr,
    row_weight_ptr,
    hard_tokens_ptr,
    entry_weight_ptr,
    nll_ptr,
    margin_ptr,
    lse_ptr,
    prediction_ptr,
    scale_ptr,
    recompute_ptr,
    rows,
    stats_stride,
    blocks,
    num_hard,
    classes,
    tcl_coeff,
    het_coeff,
    z_loss,
    FP16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    target_logit = tl.load(target_logit_ptr + row, mask=row_mask, other=0.0)
    anchor = tl.load(anchor_ptr + row, mask=row_mask, other=0.0)
    limit = tl.load(limit_ptr + row, mask=row_mask, other=0.0)

    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    argmax = tl.full((BLOCK_M,), INT32_MAX, dtype=tl.int32)
    for start in range(0, blocks, BLOCK_N):
        block = start + tl.arange(0, BLOCK_N)
        offsets = block[:, None] * stats_stride + row[None, :]
        mask = (block < blocks)[:, None] & row_mask[None, :]
        part_max = tl.load(row_max_ptr + offsets, mask=mask, other=float("-inf"))
        part_argmax = tl.load(argmax_ptr + offsets, mask=mask, other=INT32_MAX)
        chunk_max = tl.max(part_max, 0)
        chunk_argmax = tl.min(tl.where(part_max == chunk_max[None, :], part_argmax, INT32_MAX), 0)
        # later blocks hold higher class ids: only a strictly larger maximum replaces an earlier one
        argmax = tl.where(chunk_max > row_max, chunk_argmax, argmax)
        row_max = tl.maximum(chunk_max, row_max)

    overflows = row_max > limit
    used_anchor = tl.where(overflows, row_max * LOG2E, anchor)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, blocks, BLOCK_N):
        block = start + tl.arange(0, BLOCK_N)
        offsets = block[:, None] * stats_stride + row[None, :]
        mask = (block < blocks)[:, None] & row_mask[None, :]
        part_max = tl.load(row_max_ptr + offsets, mask=mask, other=float("-inf"))
        part_sum = tl.load(row_sum_ptr + offsets, mask=mask, other=0.0)
        part_anchor = tl.where(part_max > limit[None, :], part_max * LOG2E, anchor[None, :])
        row_sum += tl.sum(part_sum * tl.exp2(part_anchor - used_anchor[None, :]), 0)

    row_sum = tl.where(row_mask, row_sum, 1.0)
    target = tl.load(target_ptr + row, mask=row_mask, other=-1)
    valid = target >= 0
    # the anchor is z_y * log2(e) rounded; what rounding took is given back here, so nll does not feel it
    anchor_error = tl.fma(target_logit, LOG2E, -anchor)
    # Where the model is right, nll hangs on how close the sum is to the target's own entry. The product summed z_y in
    # another order than the anchor's dot product did: its entry is known, it is the maximum, and is replaced.
    target_e = tl.exp2(tl.fma(row_max, LOG2E, -anchor))
    row_sum += tl.where(valid & (argmax == target) & ~overflows, tl.exp2(anchor_error) - target_e, 0.0)
    nll_bits = tl.log2(row_sum) + ((used_anchor - anchor) - anchor_error)
    nll = tl.where(valid, tl.maximum(nll_bits * LN2, 0.0), 0.0)
    nll = tl.where(nll_bits != nll_bits, nll_bits, nll)  # a NaN stays one
    lse = tl.where(valid, target_logit + nll, 0.0)
    argmax = tl.minimum(argmax, classes - 1)
    margin = tl.where(valid & (argmax != target), tl.maximum(row_max - target_logit, 0.0), 0.0)

    row_weight = tl.load(row_weight_ptr + row, mask=row_mask, other=0.0)
    ce_coeff = tl.where(valid, row_weight * (1.0 + 2.0 * z_loss * lse), 0.0)
    num_entries = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for i in range(num_hard):
        token = tl.load(hard_tokens_ptr + row.to(tl.int64) * num_hard + i, mask=row_mask & valid, other=-1)
        num_entries += tl.where(token >= 0, 1.0, 0.0)
    sparse_coeff = row_weight * (1.0 + tcl_coeff) + het_coeff * tl.load(entry_weight_ptr) * num_entries
    # what is added at single classes, in units of the row scale: must fit the dtype of E
    smallest = 1.2e-38  # below 2^-126 Triton would take the constant for float64
    ratio = sparse_coeff / tl.maximum(tl.abs(ce_coeff), smallest)
    vanish = valid & (sparse_coeff > 0.0) & (ratio > 1e12)
    scale_bits = tl.zeros((BLOCK_M,), dtype=tl.float32)
    recompute = overflows & valid
    if FP16:
        scale_bits = tl.minimum(3.0, 14.0 - tl.log2(1.0 + ratio))
        recompute = recompute | (valid & ((row_sum > 64.0) | (row_sum * (1.0 + ratio) > 32768.0)))
    recompute = recompute | vanish

    lse_bits = tl.fma(target_logit, LOG2E, nll_bits)
    new_anchor = tl.where(vanish, FAR_ANCHOR, lse_bits - scale_bits)
    new_sum = tl.where(recompute, tl.exp2(tl.fma(target_logit, LOG2E, -new_anchor) + nll_bits), row_sum)
    # without any weight of its own in CE a row's unit is free; float16 holds up to 65504 of it
    unit = tl.maximum(sparse_coeff * (1.0 / 8192.0), smallest) if FP16 else 1.0
    scale = tl.where(vanish, unit, ce_coeff / new_sum)
    scale = tl.where(valid, scale, 0.0)

    tl.store(nll_ptr + row, nll, mask=row_mask)
    tl.store(margin_ptr + row, margin, mask=row_mask)
    tl.store(lse_ptr + row, lse, mask=row_mask)
    tl.store(prediction_ptr + row, tl.where(valid, argmax, -1).to(tl.int64), mask=row_mask)
    tl.store(scale_ptr + row, scale, mask=row_mask)
    tl.store(recompute_ptr + row, recompute.to(tl.int32), mask=row_mask)
    tl.store(anchor_ptr + row, tl.where(recompute, new_anchor, anchor), mask=row_mask)
    tl.store(limit_ptr + row, tl.where(recompute, float("inf"), limit), mask=row_mask)


@triton.jit(do_not_specialize=["rows", "blocks"], do_not_specialize_on_alignment=ROW_POINTERS)
def recompute_blocks_kernel(
    recompute_ptr, blocks_ptr, num_blocks_ptr, rows, blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    count = 0
    for start in range(0, blocks, BLOCK_N):
        block = start + tl.arange(0, BLOCK_N)
        row = block[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        flag = tl.max(tl.load(recompute_ptr + row, mask=row < rows, other=0), 1)
        offsets = count + tl.cumsum(flag, 0) - 1
        tl.store(blocks_ptr + offsets, block, mask=flag > 0)
        count += tl.sum(flag, 0)
    tl.store(num_blocks_ptr, count)


def row_reduce(
    block_stats: BlockStats,
    anchors: Anchors,
    row_stats: RowStats,
    target: Tensor,
    hard_tokens: Tensor,
    weights: LossWeights,
    classes: int,
    dtype: torch.dtype,
) -> None:
    """Fills `row_stats`; moves `anchors` of the rows whose E must be recomputed.

    Args:
        block_stats: statistics of every vocabulary block; their rows lie side by side, the blocks at one stride.
        anchors: those the statistics were taken at; ``anchor`` and ``limit`` of recomputed rows are overwritten.
        row_stats: overwritten.
        target: ``[R]`` int64, -1 on padding rows.
        hard_tokens: ``[R, h]`` int64, -1 = none, contiguous.
        weights: factors of the loss, ``weights.row_weight`` for these rows.
        classes: V.
        dtype: of E; float16 has little range and recomputes rows more readily.
    """
    blocks, rows = block_stats.row_sum.shape
    size = 128 if INTERPRETED else 32
    row_reduce_kernel[(triton.cdiv(rows, size),)](
        block_stats.row_sum,
        block_stats.row_max,
        block_stats.argmax,
        anchors.target_logit,
        anchors.anchor,
        anchors.limit,
        target,
        weights.row_weight,
        hard_tokens,
        weights.entry_weight,
        row_stats.nll,
        row_stats.margin,
        row_stats.lse,
        row_stats.prediction,
        row_stats.scale,
        row_stats.recompute,
        rows,
        block_stats.row_sum.stride(0),
        blocks,
        hard_tokens.shape[1],
        classes,
        weights.tcl_weight / weights.temperature,
        weights.het_weight / weights.temperature,
        weights.z_loss,
        FP16=dtype == torch.float16,
        BLOCK_M=size,
        BLOCK_N=32,
        num_warps=4,
    )


def recompute_blocks(recompute: Tensor, BLOCK_M: int) -> tuple[Tensor, Tensor]:
    """The row blocks that hold a row to be recomputed.

    Args:
        recompute: ``[R]`` int32 flags.
        BLOCK_M: rows per block.

    Returns:
        int32 list (its first `num_blocks` entries are valid) and 0-dim int32 `num_blocks`, both on the device.
    """
    blocks = triton.cdiv(recompute.shape[0], BLOCK_M)
    row_blocks = torch.empty(blocks, dtype=torch.int32, device=recompute.device)
    num_blocks = torch.empty((), dtype=torch.int32, device=recompute.device)
    recompute_blocks_kernel[(1,)](
        recompute, row_blocks, num_blocks, recompute.shape[0], blocks, BLOCK_M=BLOCK_M, BLOCK_N=32, num_warps=4
    )
    return row_blocks, num_blocks
