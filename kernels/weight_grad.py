"""The weight's gradient over the chunks of rows, in fp32 or in a split accumulator.

A split accumulator keeps a sum of 24 bits per entry in the room of a 16-bit gradient and one byte more: the upper 16
bits of an fp32 number are a bf16 number, and the byte holds the 8 bits that follow. So a sum over chunks of rows is
kept 256 times finer than bf16, for a quarter of the memory of an fp32 sum and 6 bytes of traffic per entry and chunk
rather than 8.

Reference: ``total = 24 leading bits of (total + part)``, and bf16, to the nearest, with the last part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.chunks import ALIGNMENT, Chunks
from ntpseg.kernels.gemm_configs import ArchConfigs
from ntpseg.kernels.gradient_filter import BlockMask, filtered_d_weight
from ntpseg.kernels.matmul import addmm_, matmul, row_slices
from ntpseg.kernels.tl_utils import INTERPRETED
from ntpseg.kernels.workspace import LossWeights

# Entries of a result below which a library may split a product and add its parts up in bf16: PyTorch lets it.
_SPLIT_K_BELOW = 1 << 24


@triton.jit(do_not_specialize=["entries"])
def split_accumulate_kernel(
    part_ptr, high_ptr, low_ptr, entries, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < entries
    total = tl.load(part_ptr + offsets, mask=mask, other=0.0)
    if not FIRST:
        high = tl.load(high_ptr + offsets, mask=mask, other=0).to(tl.int32)
        low = tl.load(low_ptr + offsets, mask=mask, other=0).to(tl.int32)
        total += ((high << 16) | (low << 8)).to(tl.float32, bitcast=True)
    bits = total.to(tl.int32, bitcast=True)
    if LAST:
        bits += 0x7FFF + ((bits >> 16) & 1)
    else:
        bits += 0x80
    # rounding must not carry a not-a-number into an infinity or a sign
    bits = tl.where(total == total, bits, 0x7FC00000)
    tl.store(high_ptr + offsets, (bits >> 16).to(tl.int16), mask=mask)
    if not LAST:
        tl.store(low_ptr + offsets, ((bits >> 8) & 0xFF).to(tl.uint8), mask=mask)


def split_accumulate(part: Tensor, total: Tensor, low: Tensor, *, first: bool, last: bool) -> None:
    """``total (+)= part``; with the last part `total` is the sum rounded to bf16.

    Args:
        part: fp32, contiguous.
        total: bf16, contiguous, of as many entries; not read with the first part.
        low: uint8, contiguous, of as many entries: the bits that `total` does not hold.
        first, last: whether this is the first and the last part of the sum.
    """
    size = 1 << 16 if INTERPRETED else 4096
    split_accumulate_kernel[(triton.cdiv(part.numel(), size),)](
        part, total.view(torch.int16), low, part.numel(), FIRST=first, LAST=last, BLOCK_SIZE=size, num_warps=8
    )


class WeightGrad:
    """Adds up ``E.T @ scaled`` of every chunk into the result.

    One chunk, or a result in fp32: in the result itself. Several and a 16-bit result: in fp32 and copied at the end, or
    where the plan says so in a split accumulator.

    Args:
        out: ``[V, D]`` result, overwritten.
        operand: dtype of E.
        chunks: the plan; `add` is called once per chunk.
        weights: factors of the loss, of all rows.
        configs: for the filtered product.
    """

    def __init__(
        self, out: Tensor, operand: torch.dtype, chunks: Chunks, weights: LossWeights, configs: ArchConfigs
    ) -> None:
        self._out, self._configs = out, configs
        self._added, self._num_chunks = 0, chunks.count
        direct = out.dtype == torch.float32 or (chunks.count == 1 and out.numel() >= _SPLIT_K_BELOW)
        self._low = torch.empty_like(out, dtype=torch.uint8) if chunks.split_accumulator and not direct else None
        self._total = out if direct or self._low is not None else torch.empty_like(out, dtype=torch.float32)
        # Row weights are about 1 / R, which float16 would flush to zero, or whatever the caller has made of them: the
        # largest becomes about 1.
        self.scaled_by = _power_of_two(weights) if operand == torch.float16 else None

    def add(self, e: Tensor, scaled: Tensor, block_mask: BlockMask | None) -> None:
        """Adds one chunk.

        Args:
            e: ``[C, V]``.
            scaled: ``[C, D]``, hidden rows times their scale and, unless that is None, `scaled_by`.
            block_mask: leave the other tiles of E out; None takes all.
        """
        first, last = self._added == 0, self._added == self._num_chunks - 1
        self._added += 1
        if self._low is not None:
            for cut in row_slices(self._out, block_mask.BLOCK_N if block_mask else ALIGNMENT):
                part = torch.empty_like(self._out[cut], dtype=torch.float32)
                self._product(e[:, cut], scaled, part, block_mask.classes(cut) if block_mask else None)
                split_accumulate(part, self._out[cut], self._low[cut], first=first, last=last)
        elif block_mask is not None:
            filtered_d_weight(e, scaled, self._total, block_mask, self._configs.d_weight, accumulate=not first)
        elif first:
            matmul(e.t(), scaled, self._total)
        else:
            addmm_(self._total, e.t(), scaled)
        if not last:
            return
        if self.scaled_by is not None:
            self._total.div_(self.scaled_by)
        if self._total is not self._out:
            self._out.copy_(self._total)

    def _product(self, e: Tensor, scaled: Tensor, out: Tensor, block_mask: BlockMask | None) -> None:
        if block_mask is None:
            matmul(e.t(), scaled, out)
        else:
            filtered_d_weight(e, scaled, out, block_mask, self._configs.d_weight, accumulate=False)


def _power_of_two(weights: LossWeights) -> Tensor:
    """0-dim fp32, on the device: what brings the largest row scale (see `row_reduce_kernel`) to between 1/2 and 1."""
    het = weights.entry_weight.abs() * (abs(weights.het_weight) / (8192.0 * weights.temperature))
    largest = torch.maximum(weights.row_weight.abs().amax(), het)
    exponent = torch.where(largest > 0, largest.log2().ceil(), 0.0).clamp(-100.0, 100.0)
    return torch.exp2(-exponent)
