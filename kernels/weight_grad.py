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

from ntpseg.kernels.chunks import Chunks
from ntpseg.kernels.gemm_configs import Tiles
from ntpseg.kernels.gradient_filter import LiveTiles, filtered_d_weight
from ntpseg.kernels.matmul import add_product, product, slices
from ntpseg.kernels.tl_utils import INTERPRETED


@triton.jit(do_not_specialize=["entries"])
def add_beside_kernel(
    part_ptr, high_ptr, low_ptr, entries, FIRST: tl.constexpr, LAST: tl.constexpr, SIZE: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < entries
    total = tl.load(part_ptr + place, mask=inside, other=0.0)
    if not FIRST:
        high = tl.load(high_ptr + place, mask=inside, other=0).to(tl.int32)
        low = tl.load(low_ptr + place, mask=inside, other=0).to(tl.int32)
        total += ((high << 16) | (low << 8)).to(tl.float32, bitcast=True)
    bits = total.to(tl.int32, bitcast=True)
    if LAST:
        bits += 0x7FFF + ((bits >> 16) & 1)
    else:
        bits += 0x80
    # rounding must not carry a not-a-number into an infinity or a sign
    bits = tl.where(total == total, bits, 0x7FC00000)
    tl.store(high_ptr + place, (bits >> 16).to(tl.int16), mask=inside)
    if not LAST:
        tl.store(low_ptr + place, ((bits >> 8) & 0xFF).to(tl.uint8), mask=inside)


def add_beside(part: Tensor, total: Tensor, low: Tensor, *, first: bool, last: bool) -> None:
    """``total (+)= part``; with the last part `total` is the sum rounded to bf16.

    Args:
        part: fp32, contiguous.
        total: bf16, contiguous, of as many entries; not read with the first part.
        low: uint8, contiguous, of as many entries: the bits that `total` does not hold.
        first, last: whether this is the first and the last part of the sum.
    """
    size = 1 << 16 if INTERPRETED else 4096
    add_beside_kernel[(triton.cdiv(part.numel(), size),)](
        part, total.view(torch.int16), low, part.numel(), FIRST=first, LAST=last, SIZE=size, num_warps=8
    )


_SPLIT_BELOW = 1 << 24


class WeightSum:
    """Adds up ``E.T @ scaled`` of every chunk into the result.

    One chunk, or a result in fp32: in the result itself. Several and a 16-bit result: in fp32 and copied at the end, or
    where the plan says so in the result and a byte beside each entry (`ntpseg.kernels.weight_grad`).

    Args:
        out: ``[V, D]`` result, overwritten.
        operand: dtype of E.
        chunks: the plan; `add` is called once per chunk.
        rows: R, over all chunks.
        tiles: for the filtered product.
    """

    def __init__(self, out: Tensor, operand: torch.dtype, chunks: Chunks, rows: int, tiles: Tiles) -> None:
        self._out, self._tiles = out, tiles
        self._done, self._count = 0, chunks.count
        # PyTorch lets a library split a product with a small result and add its parts up in bf16
        one = chunks.count == 1 and out.numel() >= _SPLIT_BELOW
        direct = one or out.dtype == torch.float32
        self._low = torch.empty_like(out, dtype=torch.uint8) if chunks.beside and not direct else None
        self._total = out if direct or self._low is not None else torch.empty_like(out, dtype=torch.float32)
        # shares are about 1 / R: float16 would flush them to zero
        self.raise_by = float(1 << (rows - 1).bit_length()) if operand == torch.float16 else 1.0

    def add(self, e: Tensor, scaled: Tensor, live: LiveTiles | None) -> None:
        """Adds one chunk.

        Args:
            e: ``[C, V]``.
            scaled: ``[C, D]``, hidden rows times their scale and `raise_by`.
            live: leave the other tiles of E out; None takes all.
        """
        first, last = self._done == 0, self._done == self._count - 1
        self._done += 1
        if self._low is not None:
            for cut in slices(self._out, live.classes if live else 1):
                part = torch.empty_like(self._out[cut], dtype=torch.float32)
                self._product(e[:, cut], scaled, part, live.part(cut) if live else None)
                add_beside(part, self._out[cut], self._low[cut], first=first, last=last)
        elif live is not None:
            filtered_d_weight(e, scaled, self._total, live, self._tiles.d_weight, accumulate=not first)
        elif first:
            product(e.t(), scaled, self._total)
        else:
            add_product(self._total, e.t(), scaled)
        if not last:
            return
        if self.raise_by != 1.0:
            self._total.mul_(1.0 / self.raise_by)
        if self._total is not self._out:
            self._out.copy_(self._total)

    def _product(self, e: Tensor, scaled: Tensor, out: Tensor, live: LiveTiles | None) -> None:
        if live is None:
            product(e.t(), scaled, out)
        else:
            filtered_d_weight(e, scaled, out, live, self._tiles.d_weight, accumulate=False)
