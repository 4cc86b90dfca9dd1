"""A tensor times one number that lies on the device, in place; nothing is read where that number is one.

Reference: ``out = (out.float() * factor).to(out.dtype)``. PyTorch would round the factor to the dtype of `out` first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.dialect import INTERPRETED, narrow, operand


@triton.jit
def rescale_kernel(out, factor_ptr, entries, SIZE: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        value = operand(tl.load(out + place, mask=place < entries, other=0.0)).to(tl.float32)
        tl.store(out + place, narrow(value * factor, out.dtype.element_ty), mask=place < entries)


def rescale(out: Tensor, factor: Tensor) -> Tensor:
    """Multiplies `out`, contiguous, by `factor`, 0-dim fp32, and returns it."""
    if out.numel():
        size = 1 << 16 if INTERPRETED else 8192
        rescale_kernel[(triton.cdiv(out.numel(), size),)](out, factor, out.numel(), SIZE=size, num_warps=8)
    return out
