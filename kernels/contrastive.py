"""TCL and HET: which tokens each row touches, their terms of the loss, and the few entries of E that they change.

Reference, for row r with g = share, gaps x = (z - z_y) / tau and c = het_weight * het_share:
``tcl = log(1 + sum exp(x[neg]))``, ``het = sum log(1 + exp(x[hard]))`` and
``dz = g * (1 + 2 z_loss lse) * p - g * 1_y + g * tcl_weight * d tcl/dz + c * d het/dz``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.row_reduce import Weights
from ntpseg.kernels.tl_utils import INTERPRETED, LOG2E, log1p, narrow
from ntpseg.kernels.workspace import RowStates


@triton.jit(do_not_specialize=["first", "rows", "negatives", "columns"])
def touched_tokens_kernel(
    prediction_ptr, target_ptr, reach_ptr, hard_ptr, token_ptr, first, rows, negatives, columns, SIZE: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    local = place // columns
    column = (place % columns).to(tl.int32)
    row = first + local
    inside = local < rows
    target = tl.load(target_ptr + row, mask=inside, other=-1)
    near = inside & (column < tl.minimum(tl.load(reach_ptr + row, mask=inside, other=0), negatives)) & (target >= 0)
    earlier = tl.load(prediction_ptr + row - 1 - column, mask=near, other=-1)
    hard = inside & (column >= negatives) & (target >= 0)
    wrong = tl.load(hard_ptr + row * (columns - negatives) + column - negatives, mask=hard, other=-1)
    token = tl.where(hard, wrong, tl.where(earlier == target, -1, earlier))
    tl.store(token_ptr + place, token.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["rows", "negatives", "columns", "first", "classes"])
def touch_up_kernel(
    e_ptr,
    token_ptr,
    z_ptr,
    logit_ptr,
    target_ptr,
    nll_ptr,
    lse_ptr,
    share_ptr,
    het_share_ptr,
    scale_ptr,
    tcl_ptr,
    het_ptr,
    rows,
    negatives,
    columns,
    first,
    classes,
    e_stride,
    tcl_weight,
    het_weight,
    z_loss,
    inverse_tau,
    STORE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, COLUMNS)
    place = row[:, None] * columns + column[None, :]
    token = tl.load(token_ptr + place, mask=inside[:, None] & (column < columns)[None, :], other=-1)
    valid = token >= 0
    z = tl.load(z_ptr + place, mask=valid, other=0.0)
    logit = tl.load(logit_ptr + row, mask=inside, other=0.0)
    target = tl.load(target_ptr + row, mask=inside, other=-1)

    x = tl.where(valid, (z - logit[:, None]) * inverse_tau, float("-inf"))
    is_negative = (column < negatives)[None, :]
    near = tl.where(is_negative, x, float("-inf"))
    top = tl.maximum(tl.max(near, 1), 0.0)
    near_sum = tl.sum(tl.exp2((near - top[:, None]) * LOG2E), 1)
    # log(1 + sum exp(x)) = top + log(exp(-top) + sum exp(x - top)); log1p keeps its small values where top is 0
    tcl = tl.where(top > 0.0, top + tl.log(tl.exp2(-top * LOG2E) + near_sum), log1p(near_sum))
    small = tl.exp2(-tl.abs(x) * LOG2E)  # exp(-|x|), 0 where there is no token
    het = tl.where(valid & (column >= negatives)[None, :], tl.maximum(x, 0.0) + log1p(small), 0.0)
    tl.store(tcl_ptr + row, tcl, mask=inside)
    tl.store(het_ptr + row, tl.sum(het, 1), mask=inside)

    if STORE:
        share = tl.load(share_ptr + row, mask=inside, other=0.0)
        nll = tl.load(nll_ptr + row, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
        dense = share * (1.0 + 2.0 * z_loss * lse)
        near_factor = share * tcl_weight * inverse_tau
        far_factor = het_weight * inverse_tau * tl.load(het_share_ptr)
        softmax = tl.exp2((near - tcl[:, None]) * LOG2E)
        sigmoid = tl.where(x >= 0.0, 1.0, small) / (1.0 + small)
        pull = tl.where(is_negative, near_factor[:, None] * softmax, far_factor * sigmoid)
        pull = tl.where(valid, pull, 0.0)
        pulled = tl.sum(pull, 1)

        # A token may occur several times in a row, as negative and as hard token. Every occurrence gets the same
        # total, so that all of them store the same value and their order does not matter.
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for i in range(columns):
            other = tl.load(token_ptr + row * columns + i, mask=inside, other=-1)
            x_i = (tl.load(z_ptr + row * columns + i, mask=inside, other=0.0) - logit) * inverse_tau
            small_i = tl.exp2(-tl.abs(x_i) * LOG2E)
            near_i = near_factor * tl.exp2((x_i - tcl) * LOG2E)
            far_i = far_factor * tl.where(x_i >= 0.0, 1.0, small_i) / (1.0 + small_i)
            pull_i = tl.where(other >= 0, tl.where(i < negatives, near_i, far_i), 0.0)
            total += tl.where(token == other[:, None], pull_i[:, None], 0.0)

        p = tl.exp2(((z - logit[:, None]) - nll[:, None]) * LOG2E)
        unit = tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))
        value = (dense[:, None] * p + total) * unit[:, None]
        # p_y - 1 without cancellation where p_y is close to 1
        series = nll * (1.0 - nll * (0.5 - nll * (0.16666667 - nll * 0.041666668)))
        gone = tl.where(nll < 0.0625, series, 1.0 - tl.exp2(-nll * LOG2E))
        value_y = ((dense - share) * (1.0 - gone) - share * gone - pulled) * unit
        if HALF:
            value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
            value_y = tl.minimum(tl.maximum(value_y, -65504.0), 65504.0)
        line = e_ptr + row * e_stride
        own = token - first  # a shard of the vocabulary holds some of them only
        mask = valid & (own >= 0) & (own < classes)
        tl.store(line[:, None] + own, narrow(value, e_ptr.dtype.element_ty), mask=mask)
        own_y = target - first
        mask_y = inside & (target >= 0) & (own_y >= 0) & (own_y < classes)
        tl.store(line + own_y, narrow(value_y, e_ptr.dtype.element_ty), mask=mask_y)


def touched_tokens(
    prediction: Tensor, target: Tensor, reach: Tensor, hard: Tensor, first: int, rows: int, negatives: int
) -> Tensor:
    """Negatives and hard tokens of rows ``first .. first + rows - 1``.

    Args:
        prediction, target: ``[R]`` int64 over all rows; predictions up to the last of these rows must be known.
        reach: ``[R]`` int32, how many rows just before predict the negatives.
        hard: ``[R, h]`` int64, -1 = none, contiguous.
        first, rows: the part.
        negatives: m.

    Returns:
        ``[rows, m + h]`` int32, -1 = none; a negative equal to the target is none.
    """
    columns = negatives + hard.shape[1]
    token = torch.empty(rows, columns, dtype=torch.int32, device=target.device)
    if token.numel() == 0:
        return token
    size = 4096 if INTERPRETED else 256
    touched_tokens_kernel[(triton.cdiv(token.numel(), size),)](
        prediction, target, reach, hard, token, first, rows, negatives, columns, SIZE=size, num_warps=4
    )
    return token


def touch_up(
    e: Tensor | None,
    token: Tensor,
    z: Tensor,
    logit: Tensor,
    target: Tensor,
    states: RowStates,
    weights: Weights,
    negatives: int,
    tcl: Tensor,
    het: Tensor,
    first: int = 0,
    classes: int | None = None,
) -> None:
    """Writes the terms of TCL and HET and, unless `e` is None, the touched entries of E.

    Args:
        e: ``[R, >= V]``, changed at those of the touched tokens and the target of each row that it has columns for.
        token: ``[R, m + h]`` int32 from `touched_tokens`.
        z: ``[R, m + h]`` fp32, their logits.
        logit: ``[R]`` fp32, z_y.
        target: ``[R]`` int64, -1 on padding rows.
        states: results of these rows.
        weights: factors of the loss for these rows.
        negatives: m.
        tcl, het: ``[R]`` fp32, overwritten.
        first, classes: E has the columns ``first <= token < first + classes``; None: as many as it is wide.
    """
    rows, columns = token.shape
    if classes is None:
        classes = 0 if e is None else e.shape[1]
    size = max(8, triton.next_power_of_2(columns))
    step = 128 if INTERPRETED else max(1, 256 // size)
    touch_up_kernel[(triton.cdiv(rows, step),)](
        e if e is not None else logit,
        token,
        z,
        logit,
        target,
        states.nll,
        states.lse,
        weights.share,
        weights.het_share,
        states.scale,
        tcl,
        het,
        rows,
        negatives,
        columns,
        first,
        classes,
        e.stride(0) if e is not None else 0,
        weights.tcl_weight,
        weights.het_weight,
        weights.z_loss,
        1.0 / weights.temperature,
        STORE=e is not None,
        HALF=e is not None and e.dtype == torch.float16,
        ROWS=step,
        COLUMNS=size,
        num_warps=4,
    )
