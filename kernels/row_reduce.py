"""From partials to row results, and the decision which rows must be done again.

Reference: ``nll = logsumexp(z) - z_y``, ``margin = max z - z_y``, ``prediction = argmax z``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import FAR_ANCHOR, INTERPRETED, LN2, LOG2E, NO_TOKEN
from ntpseg.kernels.workspace import Anchors, Partials, RowStates

# Above exp(48) the smallest row scale would leave the normal range of bf16; float16 itself ends at exp(11).
_LIMIT = {torch.float16: 10.0}
_DEFAULT_LIMIT = 48.0


def overflow_gap(dtype: torch.dtype) -> float:
    """``max z - z_y`` above which a row of E in this dtype is done again with another anchor."""
    return _LIMIT.get(dtype, _DEFAULT_LIMIT)


@dataclass(frozen=True)
class Weights:
    """The factors of the loss that enter a row's gradient.

    Attributes:
        share: ``[R]`` fp32, weight of the row in CE and TCL.
        het_share: 0-dim fp32, weight of one hard token (het_weight not included).
        tcl_weight, het_weight, z_loss, temperature: see `ntpseg.losses.LossOptions`.
    """

    share: Tensor
    het_share: Tensor
    tcl_weight: float
    het_weight: float
    z_loss: float
    temperature: float


@triton.jit(do_not_specialize=["rows", "blocks", "hard", "classes"])
def combine_kernel(
    sum_ptr,
    max_ptr,
    arg_ptr,
    logit_ptr,
    anchor_ptr,
    limit_ptr,
    target_ptr,
    share_ptr,
    hard_ptr,
    het_share_ptr,
    nll_ptr,
    margin_ptr,
    lse_ptr,
    prediction_ptr,
    scale_ptr,
    redo_ptr,
    rows,
    blocks,
    hard,
    classes,
    tcl_pull,
    het_pull,
    z_loss,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    logit = tl.load(logit_ptr + row, mask=inside, other=0.0)
    anchor = tl.load(anchor_ptr + row, mask=inside, other=0.0)
    limit = tl.load(limit_ptr + row, mask=inside, other=0.0)

    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    best = tl.full((ROWS,), NO_TOKEN, dtype=tl.int32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        place = block[:, None] * rows + row[None, :]
        mask = (block < blocks)[:, None] & inside[None, :]
        tops = tl.load(max_ptr + place, mask=mask, other=float("-inf"))
        ids = tl.load(arg_ptr + place, mask=mask, other=NO_TOKEN)
        here = tl.max(tops, 0)
        lowest = tl.min(tl.where(tops == here[None, :], ids, NO_TOKEN), 0)
        # later blocks hold higher ids: only a strictly larger maximum replaces an earlier one
        best = tl.where(here > top, lowest, best)
        top = tl.maximum(here, top)

    over = top > limit
    used = tl.where(over, top * LOG2E, anchor)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        place = block[:, None] * rows + row[None, :]
        mask = (block < blocks)[:, None] & inside[None, :]
        tops = tl.load(max_ptr + place, mask=mask, other=float("-inf"))
        sums = tl.load(sum_ptr + place, mask=mask, other=0.0)
        at = tl.where(tops > limit[None, :], tops * LOG2E, anchor[None, :])
        total += tl.sum(sums * tl.exp2(at - used[None, :]), 0)

    total = tl.where(inside, total, 1.0)
    target = tl.load(target_ptr + row, mask=inside, other=-1)
    real = target >= 0
    # the anchor is z_y * log2(e) rounded; what rounding took is given back here, so nll does not feel it
    rest = tl.fma(logit, LOG2E, -anchor)
    # Where the model is right, nll hangs on how close the sum is to the target's own entry. The product summed z_y in
    # another order than the anchor's dot product did: its entry is known, it is the maximum, and is replaced.
    own = tl.exp2(tl.fma(top, LOG2E, -anchor))
    total += tl.where(real & (best == target) & ~over, tl.exp2(rest) - own, 0.0)
    bits = tl.log2(total) + ((used - anchor) - rest)
    nll = tl.where(real, tl.maximum(bits * LN2, 0.0), 0.0)
    nll = tl.where(bits != bits, bits, nll)  # a NaN stays one
    lse = tl.where(real, logit + nll, 0.0)
    best = tl.minimum(best, classes - 1)
    margin = tl.where(real & (best != target), tl.maximum(top - logit, 0.0), 0.0)

    share = tl.load(share_ptr + row, mask=inside, other=0.0)
    dense = tl.where(real, share * (1.0 + 2.0 * z_loss * lse), 0.0)
    hets = tl.zeros((ROWS,), dtype=tl.float32)
    for i in range(hard):
        token = tl.load(hard_ptr + row.to(tl.int64) * hard + i, mask=inside & real, other=-1)
        hets += tl.where(token >= 0, 1.0, 0.0)
    pull = share * (1.0 + tcl_pull) + het_pull * tl.load(het_share_ptr) * hets
    # what is added at single classes, in units of the row scale: must fit the dtype of E
    ratio = pull / tl.maximum(tl.abs(dense), 1.2e-38)  # below 2^-126 Triton would take the constant for float64
    vanish = real & (pull > 0.0) & (ratio > 1e12)
    scale_bits = tl.zeros((ROWS,), dtype=tl.float32)
    again = over & real
    if HALF:
        scale_bits = tl.minimum(3.0, 14.0 - tl.log2(1.0 + ratio))
        again = again | (real & ((total > 64.0) | (total * (1.0 + ratio) > 32768.0)))
    again = again | vanish

    lse_bits = tl.fma(logit, LOG2E, bits)
    moved = tl.where(vanish, FAR_ANCHOR, lse_bits - scale_bits)
    sum_e = tl.where(again, tl.exp2(tl.fma(logit, LOG2E, -moved) + bits), total)
    scale = tl.where(vanish, 1.0, dense / sum_e)
    scale = tl.where(real, scale, 0.0)

    tl.store(nll_ptr + row, nll, mask=inside)
    tl.store(margin_ptr + row, margin, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    tl.store(prediction_ptr + row, tl.where(real, best, -1).to(tl.int64), mask=inside)
    tl.store(scale_ptr + row, scale, mask=inside)
    tl.store(redo_ptr + row, again.to(tl.int32), mask=inside)
    tl.store(anchor_ptr + row, tl.where(again, moved, anchor), mask=inside)
    tl.store(limit_ptr + row, tl.where(again, float("inf"), limit), mask=inside)


@triton.jit(do_not_specialize=["rows", "blocks"])
def redo_list_kernel(redo_ptr, list_ptr, count_ptr, rows, blocks, BR: tl.constexpr, BLOCKS: tl.constexpr):
    found = 0
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        row = block[:, None] * BR + tl.arange(0, BR)[None, :]
        flag = tl.max(tl.load(redo_ptr + row, mask=row < rows, other=0), 1)
        place = found + tl.cumsum(flag, 0) - 1
        tl.store(list_ptr + place, block, mask=flag > 0)
        found += tl.sum(flag, 0)
    tl.store(count_ptr, found)


def combine(
    partials: Partials,
    anchors: Anchors,
    states: RowStates,
    target: Tensor,
    hard: Tensor,
    weights: Weights,
    classes: int,
    dtype: torch.dtype,
) -> None:
    """Fills `states`; moves `anchors` of the rows that must be done again.

    Args:
        partials: statistics of every vocabulary block.
        anchors: those the partials were taken at; ``anchor`` and ``limit`` of redone rows are overwritten.
        states: overwritten.
        target: ``[R]`` int64, -1 on padding rows.
        hard: ``[R, h]`` int64, -1 = none, contiguous.
        weights: factors of the loss, ``weights.share`` for these rows.
        classes: V.
        dtype: of E; float16 has little range and redoes rows more readily.
    """
    blocks, rows = partials.sum.shape
    size = 128 if INTERPRETED else 32
    combine_kernel[(triton.cdiv(rows, size),)](
        partials.sum,
        partials.max,
        partials.arg,
        anchors.logit,
        anchors.anchor,
        anchors.limit,
        target,
        weights.share,
        hard,
        weights.het_share,
        states.nll,
        states.margin,
        states.lse,
        states.prediction,
        states.scale,
        states.redo,
        rows,
        blocks,
        hard.shape[1],
        classes,
        weights.tcl_weight / weights.temperature,
        weights.het_weight / weights.temperature,
        weights.z_loss,
        HALF=dtype == torch.float16,
        ROWS=size,
        BLOCKS=32,
        num_warps=4,
    )


def redo_list(redo: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """The row blocks that hold a row to be done again.

    Args:
        redo: ``[R]`` int32 flags.
        block_rows: rows per block.

    Returns:
        int32 list (its first `count` entries are valid) and 0-dim int32 count, both on the device.
    """
    blocks = triton.cdiv(redo.shape[0], block_rows)
    found = torch.empty(blocks, dtype=torch.int32, device=redo.device)
    count = torch.empty((), dtype=torch.int32, device=redo.device)
    redo_list_kernel[(1,)](redo, found, count, redo.shape[0], blocks, BR=block_rows, BLOCKS=32, num_warps=4)
    return found, count
