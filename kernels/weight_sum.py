"""The weight's gradient over the chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ntpseg.kernels.beside import add_beside
from ntpseg.kernels.chunks import Chunks
from ntpseg.kernels.filtered import filtered_d_weight
from ntpseg.kernels.live_tiles import LiveTiles
from ntpseg.kernels.products import add_product, product, slices
from ntpseg.kernels.table import Tiles

_SPLIT_BELOW = 1 << 24


class WeightSum:
    """Adds up ``E.T @ scaled`` of every chunk into the result.

    One chunk, or a result in fp32: in the result itself. Several and a 16-bit result: in fp32 and copied at the end, or
    where the plan says so in the result and a byte beside each entry (`ntpseg.kernels.beside`).

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
