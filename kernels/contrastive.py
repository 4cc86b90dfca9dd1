"""TCL and HET: the tokens that each row is contrasted with, their terms of the loss, and the entries of E they change.

Reference, for row r with g = row_weight, gaps x = (z - z_y) / tau and c = het_weight * entry_weight:
``tcl = log(1 + sum exp(x[neg]))``, ``het = sum log(1 + exp(x[hard]))`` and
``dz = g * (1 + 2 z_loss lse) * p - g * 1_y + g * tcl_weight * d tcl/dz + c * d het/dz``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED, LOG2E, ROW_POINTERS, downcast, log1p
from ntpseg.kernels.workspace import LossWeights, RowStats


@triton.jit(
    do_not_specialize=["row_start", "rows", "negatives", "columns"], do_not_specialize_on_alignment=ROW_POINTERS
)
def contrastive_tokens_kernel(
    prediction_ptr,
    target_ptr,
    num_negatives_ptr,
    hard_tokens_ptr,
    token_ptr,
    row_start,
    rows,
    negatives,
    columns,
    BLOCK_SIZE: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    local = offsets // columns
    column = (offsets % columns).to(tl.int32)
    row = row_start + local
    row_mask = local < rows
    target = tl.load(target_ptr + row, mask=row_mask, other=-1)
    available = tl.minimum(tl.load(num_negatives_ptr + row, mask=row_mask, other=0), negatives)
    is_negative = row_mask & (column < available) & (target >= 0)
    negative = tl.load(prediction_ptr + row - 1 - column, mask=is_negative, other=-1)
    is_hard = row_mask & (column >= negatives) & (target >= 0)
    hard_token = tl.load(hard_tokens_ptr + row * (columns - negatives) + column - negatives, mask=is_hard, other=-1)
    token = tl.where(is_hard, hard_token, tl.where(negative == target, -1, negative))
    tl.store(token_ptr + offsets, token.to(tl.int32), mask=row_mask)


@triton.jit(
    do_not_specialize=["rows", "negatives", "columns", "class_start", "classes"],
    # single entries of E are written, and without E another array stands in for it
    do_not_specialize_on_alignment=(*ROW_POINTERS, "e_ptr"),
)
def contrastive_kernel(
    e_ptr,
    token_ptr,
    z_ptr,
    target_logit_ptr,
    target_ptr,
    nll_ptr,
    lse_ptr,
    row_weight_ptr,
    entry_weight_ptr,
    scale_ptr,
    tcl_ptr,
    het_ptr,
    rows,
    negatives,
    columns,
    class_start,
    classes,
    e_stride,
    tcl_weight,
    het_weight,
    z_loss,
    inverse_tau,
    STORE: tl.constexpr,
    FP16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    column = tl.arange(0, BLOCK_N)
    offsets = row[:, None] * columns + column[None, :]
    token = tl.load(token_ptr + offsets, mask=row_mask[:, None] & (column < columns)[None, :], other=-1)
    valid = token >= 0
    z = tl.load(z_ptr + offsets, mask=valid, other=0.0)
    target_logit = tl.load(target_logit_ptr + row, mask=row_mask, other=0.0)
    target = tl.load(target_ptr + row, mask=row_mask, other=-1)

    x = tl.where(valid, (z - target_logit[:, None]) * inverse_tau, float("-inf"))
    is_negative = (column < negatives)[None, :]
    x_negative = tl.where(is_negative, x, float("-inf"))
    x_max = tl.maximum(tl.max(x_negative, 1), 0.0)
    negative_sum = tl.sum(tl.exp2((x_negative - x_max[:, None]) * LOG2E), 1)
    # log(1 + sum exp(x)) = x_max + log(exp(-x_max) + sum exp(x - x_max)); log1p keeps small values where x_max is 0
    tcl = tl.where(x_max > 0.0, x_max + tl.log(tl.exp2(-x_max * LOG2E) + negative_sum), log1p(negative_sum))
    exp_neg_abs = tl.exp2(-tl.abs(x) * LOG2E)  # exp(-|x|), 0 where there is no token
    het = tl.where(valid & (column >= negatives)[None, :], tl.maximum(x, 0.0) + log1p(exp_neg_abs), 0.0)
    tl.store(tcl_ptr + row, tcl, mask=row_mask)
    tl.store(het_ptr + row, tl.sum(het, 1), mask=row_mask)

    if STORE:
        row_weight = tl.load(row_weight_ptr + row, mask=row_mask, other=0.0)
        nll = tl.load(nll_ptr + row, mask=row_mask, other=0.0)
        lse = tl.load(lse_ptr + row, mask=row_mask, other=0.0)
        scale = tl.load(scale_ptr + row, mask=row_mask, other=0.0)
        ce_coeff = row_weight * (1.0 + 2.0 * z_loss * lse)
        tcl_coeff = row_weight * tcl_weight * inverse_tau
        het_coeff = het_weight * inverse_tau * tl.load(entry_weight_ptr)
        softmax = tl.exp2((x_negative - tcl[:, None]) * LOG2E)
        sigmoid = tl.where(x >= 0.0, 1.0, exp_neg_abs) / (1.0 + exp_neg_abs)
        grad = tl.where(is_negative, tcl_coeff[:, None] * softmax, het_coeff * sigmoid)
        grad = tl.where(valid, grad, 0.0)
        grad_sum = tl.sum(grad, 1)

        # A token may occur several times in a row, as negative and as hard token. Every occurrence gets the same
        # total, so that all of them store the same value and their order does not matter.
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i in range(columns):
            other = tl.load(token_ptr + row * columns + i, mask=row_mask, other=-1)
            x_i = (tl.load(z_ptr + row * columns + i, mask=row_mask, other=0.0) - target_logit) * inverse_tau
            exp_neg_abs_i = tl.exp2(-tl.abs(x_i) * LOG2E)
            tcl_grad_i = tcl_coeff * tl.exp2((x_i - tcl) * LOG2E)
            het_grad_i = het_coeff * tl.where(x_i >= 0.0, 1.0, exp_neg_abs_i) / (1.0 + exp_neg_abs_i)
            grad_i = tl.where(other >= 0, tl.where(i < negatives, tcl_grad_i, het_grad_i), 0.0)
            total += tl.where(token == other[:, None], grad_i[:, None], 0.0)

        p = tl.exp2(((z - target_logit[:, None]) - nll[:, None]) * LOG2E)
        inv_scale = tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))
        value = (ce_coeff[:, None] * p + total) * inv_scale[:, None]
        # p_y - 1 without cancellation where p_y is close to 1
        series = nll * (1.0 - nll * (0.5 - nll * (0.16666667 - nll * 0.041666668)))
        one_minus_p = tl.where(nll < 0.0625, series, 1.0 - tl.exp2(-nll * LOG2E))
        value_y = ((ce_coeff - row_weight) * (1.0 - one_minus_p) - row_weight * one_minus_p - grad_sum) * inv_scale
        if FP16:
            value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
            value_y = tl.minimum(tl.maximum(value_y, -65504.0), 65504.0)
        row_ptr = e_ptr + row * e_stride
        column_e = token - class_start  # a shard of the vocabulary holds some of them only
        mask = valid & (column_e >= 0) & (column_e < classes)
        tl.store(row_ptr[:, None] + column_e, downcast(value, e_ptr.dtype.element_ty), mask=mask)
        column_y = target - class_start
        mask_y = row_mask & (target >= 0) & (column_y >= 0) & (column_y < classes)
        tl.store(row_ptr + column_y, downcast(value_y, e_ptr.dtype.element_ty), mask=mask_y)


def contrastive_tokens(
    prediction: Tensor,
    target: Tensor,
    num_negatives: Tensor,
    hard_tokens: Tensor,
    row_start: int,
    rows: int,
    negatives: int,
) -> Tensor:
    """Negatives and hard tokens of rows ``row_start .. row_start + rows - 1``.

    Args:
        prediction, target: ``[R]`` int64 over all rows; predictions up to the last of these rows must be known.
        num_negatives: ``[R]`` int32, how many rows just before predict the negatives.
        hard_tokens: ``[R, h]`` int64, -1 = none, contiguous.
        row_start, rows: which rows.
        negatives: m.

    Returns:
        ``[rows, m + h]`` int32, -1 = none; a negative equal to the target is none.
    """
    columns = negatives + hard_tokens.shape[1]
    token = torch.empty(rows, columns, dtype=torch.int32, device=target.device)
    if token.numel() == 0:
        return token
    size = 4096 if INTERPRETED else 256
    contrastive_tokens_kernel[(triton.cdiv(token.numel(), size),)](
        prediction,
        target,
        num_negatives,
        hard_tokens,
        token,
        row_start,
        rows,
        negatives,
        columns,
        BLOCK_SIZE=size,
        num_warps=4,
    )
    return token


def contrastive(
    e: Tensor | None,
    token: Tensor,
    z: Tensor,
    target_logit: Tensor,
    target: Tensor,
    row_stats: RowStats,
    weights: LossWeights,
    negatives: int,
    tcl: Tensor,
    het: Tensor,
    class_start: int = 0,
    classes: int | None = None,
) -> None:
    """Writes the terms of TCL and HET and, unless `e` is None, the entries of E that become logit gradients.

    Args:
        e: ``[R, >= V]``, changed at the contrastive tokens and the target of each row, those that it has columns for.
        token: ``[R, m + h]`` int32 from `contrastive_tokens`.
        z: ``[R, m + h]`` fp32, their logits.
        target_logit: ``[R]`` fp32, z_y.
        target: ``[R]`` int64, -1 on padding rows.
        row_stats: results of these rows.
        weights: factors of the loss for these rows.
        negatives: m.
        tcl, het: ``[R]`` fp32, overwritten.
        class_start, classes: E has the columns ``class_start <= token < class_start + classes``; None: as many as it
            is wide.
    """
    rows, columns = token.shape
    if classes is None:
        classes = 0 if e is None else e.shape[1]
    size = max(8, triton.next_power_of_2(columns))
    step = 128 if INTERPRETED else max(1, 256 // size)
    contrastive_kernel[(triton.cdiv(rows, step),)](
        e if e is not None else target_logit,
        token,
        z,
        target_logit,
        target,
        row_stats.nll,
        row_stats.lse,
        weights.row_weight,
        weights.entry_weight,
        row_stats.scale,
        tcl,
        het,
        rows,
        negatives,
        columns,
        class_start,
        classes,
        e.stride(0) if e is not None else 0,
        weights.tcl_weight,
        weights.het_weight,
        weights.z_loss,
        1.0 / weights.temperature,
        STORE=e is not None,
        FP16=e is not None and e.dtype == torch.float16,
        BLOCK_M=step,
        BLOCK_N=size,
        num_warps=4,
    )
