"""Single logits: z[r, token] for a few tokens per row, in fp32, without the whole matrix product.

Reference: ``(hidden.float().unsqueeze(1) * weight.float()[tokens]).sum(-1)``, 0 where the token is -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["token_ptr"])
def indexed_dot_kernel(
    hidden,
    weight,
    token_ptr,
    out_ptr,
    rows,
    columns,
    width,
    hidden_stride,
    weight_stride,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    pair = row[:, None] * columns + column[None, :]
    token = tl.load(token_ptr + pair, mask=mask, other=-1)
    if WIDE:
        row, token = row.to(tl.int64), token.to(tl.int64)
    else:
        token = token.to(tl.int32)
    valid = token >= 0
    used = tl.max(valid.to(tl.int32), 1) > 0
    total = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_D), dtype=tl.float32)
    if tl.max(used.to(tl.int32), 0) > 0:  # most negatives of a trained model equal the target and drop out
        a_ptr = hidden + row[:, None] * hidden_stride
        b_ptr = weight + token[:, :, None] * weight_stride
        for start in range(0, width, BLOCK_D):
            feature = start + tl.arange(0, BLOCK_D)
            feature_mask = feature < width
            # a row is read once for all of its tokens
            a = tl.load(a_ptr + feature[None, :], mask=used[:, None] & feature_mask[None, :], other=0.0)
            b = tl.load(b_ptr + feature[None, None, :], mask=valid[:, :, None] & feature_mask[None, None, :], other=0.0)
            total += a.to(tl.float32)[:, None, :] * b.to(tl.float32)
    # a missing token has no logit, whatever the row holds
    tl.store(out_ptr + pair, tl.where(valid, tl.sum(total, 2), 0.0), mask=mask)


def indexed_dot(hidden: Tensor, weight: Tensor, token: Tensor) -> Tensor:
    """The dot product of each row with its tokens' rows of the weight.

    Args:
        hidden: ``[R, D]``, last dimension contiguous.
        weight: ``[V, D]``, last dimension contiguous.
        token: ``[R, K]`` integer, contiguous, -1 = none.

    Returns:
        ``[R, K]`` fp32, 0 where the token is -1.
    """
    rows, columns = token.shape
    out = torch.empty(rows, columns, dtype=torch.float32, device=hidden.device)
    if out.numel() == 0:
        return out
    step = min(8, triton.next_power_of_2(columns))
    # with 512 features and 4 warps ptxas spills 16 bytes for 8 tokens of unaligned float16 rows
    size, depth, warps = (256, 128, 4) if INTERPRETED else (8, 1024, 8) if step == 8 else (8, 512, 4)
    indexed_dot_kernel[(triton.cdiv(rows, size // step), triton.cdiv(columns, step))](
        hidden,
        weight,
        token,
        out,
        rows,
        columns,
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        WIDE=max(rows * hidden.stride(0), weight.shape[0] * weight.stride(0), out.numel()) >= 1 << 31,
        BLOCK_M=size // step,
        BLOCK_N=step,
        BLOCK_D=depth,
        num_warps=warps,
    )
    return out
