"""Single logits: z[r, token] for a few tokens per row, in fp32, without the whole matrix product.

Reference: ``(hidden.float().unsqueeze(1) * weight.float()[tokens]).sum(-1)``, 0 where the token is -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED


@triton.jit(do_not_specialize=["pairs", "columns"], do_not_specialize_on_alignment=["token_ptr"])
def indexed_dot_kernel(
    hidden,
    weight,
    token_ptr,
    out_ptr,
    pairs,
    columns,
    width,
    hidden_stride,
    weight_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = pair < pairs
    token = tl.load(token_ptr + pair, mask=mask, other=-1).to(tl.int64)
    valid = token >= 0
    total = tl.zeros((BLOCK_SIZE, BLOCK_D), dtype=tl.float32)
    if tl.max(valid.to(tl.int32), 0) > 0:  # most negatives of a trained model equal the target and drop out
        a_ptr = hidden + (pair // columns)[:, None] * hidden_stride
        b_ptr = weight + token[:, None] * weight_stride
        for start in range(0, width, BLOCK_D):
            feature = start + tl.arange(0, BLOCK_D)
            operand_mask = valid[:, None] & (feature < width)[None, :]
            a = tl.load(a_ptr + feature[None, :], mask=operand_mask, other=0.0)
            b = tl.load(b_ptr + feature[None, :], mask=operand_mask, other=0.0)
            total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out_ptr + pair, tl.sum(total, 1), mask=mask)


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
    size, depth = (256, 128) if INTERPRETED else (16, 256)
    indexed_dot_kernel[(triton.cdiv(out.numel(), size),)](
        hidden,
        weight,
        token,
        out,
        out.numel(),
        columns,
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        BLOCK_SIZE=size,
        BLOCK_D=depth,
        num_warps=4,
    )
    return out
