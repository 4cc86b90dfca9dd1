"""Single logits: z[r, token] for a few tokens per row, in fp32, without the product of everything with everything.

Reference: ``(hidden.float().unsqueeze(1) * weight.float()[tokens]).sum(-1)``, 0 where the token is -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED


@triton.jit(do_not_specialize=["pairs", "columns"])
def pair_logits_kernel(
    hidden,
    weight,
    token_ptr,
    out_ptr,
    pairs,
    columns,
    width,
    hidden_stride,
    weight_stride,
    PAIRS: tl.constexpr,
    BD: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    token = tl.load(token_ptr + pair, mask=inside, other=-1).to(tl.int64)
    wanted = token >= 0
    total = tl.zeros((PAIRS, BD), dtype=tl.float32)
    if tl.max(wanted.to(tl.int32), 0) > 0:  # most negatives of a trained model equal the target and drop out
        a_ptr = hidden + (pair // columns)[:, None] * hidden_stride
        b_ptr = weight + token[:, None] * weight_stride
        for start in range(0, width, BD):
            feature = start + tl.arange(0, BD)
            mask = wanted[:, None] & (feature < width)[None, :]
            a = tl.load(a_ptr + feature[None, :], mask=mask, other=0.0)
            b = tl.load(b_ptr + feature[None, :], mask=mask, other=0.0)
            total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out_ptr + pair, tl.sum(total, 1), mask=inside)


def pair_logits(hidden: Tensor, weight: Tensor, token: Tensor) -> Tensor:
    """Logits of the given tokens.

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
    pairs, depth = (256, 128) if INTERPRETED else (16, 256)
    pair_logits_kernel[(triton.cdiv(out.numel(), pairs),)](
        hidden,
        weight,
        token,
        out,
        out.numel(),
        columns,
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        PAIRS=pairs,
        BD=depth,
        num_warps=4,
    )
    return out
