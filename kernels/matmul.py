"""Plain matrix products of 16-bit operands with fp32 results, through cuBLAS."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ntpseg.kernels.chunks import ALIGNMENT, SLICE_BYTES


def matmul(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``out = left @ right``, accumulated in fp32 and rounded once, to the dtype of `out`.

    Args:
        left, right: ``[M, K]`` and ``[K, N]``, the same dtype.
        out: ``[M, N]``, their dtype or float32.

    Returns:
        `out`.
    """
    if left.dtype == out.dtype and (left.is_cuda or left.dtype == torch.float32):
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(left.float() @ right.float())


def addmm_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``out += left @ right`` without rounding to less than fp32; `out` is float32 ``[M, N]``."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right)
    if left.is_cuda and _mixed_addmm(left.dtype, left.device):
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    for rows in row_slices(out):
        part = out[rows]
        part += matmul(left[rows], right, torch.empty_like(part))
    return out


def row_slices(out: Tensor, unit: int = ALIGNMENT) -> list[slice]:
    """Rows of `out` in slices, whole multiples of `unit`, whose fp32 form has about `SLICE_BYTES`.

    They are columns of the other factor, E: with fewer than `ALIGNMENT` of them a slice may start between two 16-byte
    words, for which cuBLAS has slow kernels alone.
    """
    step = max(1, SLICE_BYTES // (4 * out.shape[1] * unit)) * unit
    return [slice(low, low + step) for low in range(0, out.shape[0], step)]


@functools.cache
def _mixed_addmm(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this PyTorch adds a 16-bit product to an fp32 matrix in place (older ones want one dtype for all)."""
    small = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, small, small, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
