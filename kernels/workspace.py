"""Per-row arrays that travel between the kernels of one chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Anchors:
    """What E is measured from.

    Attributes:
        logit: ``[R]`` fp32, z_y, natural units; 0 on padding rows.
        anchor: ``[R]`` fp32, ``E = exp2(z * log2(e) - anchor)``; rewritten for rows that are done again.
        limit: ``[R]`` fp32, the logit above which a row must be done again.
    """

    logit: Tensor
    anchor: Tensor
    limit: Tensor

    def part(self, low: int, high: int) -> Anchors:
        """Rows ``low .. high - 1``, as views."""
        return Anchors(self.logit[low:high], self.anchor[low:high], self.limit[low:high])


@dataclass(frozen=True)
class Partials:
    """Row statistics of each vocabulary block: plain stores and a fixed order of summation, no atomics.

    Attributes:
        sum: ``[blocks, R]`` fp32, sum of E over the block (relative to the block's maximum where that is above limit).
        max: ``[blocks, R]`` fp32, largest logit.
        arg: ``[blocks, R]`` int32, lowest class id that has it.
    """

    sum: Tensor
    max: Tensor
    arg: Tensor

    @staticmethod
    def empty(blocks: int, rows: int, device: torch.device) -> Partials:
        """Uninitialised arrays: every entry is written before it is read."""
        # one allocation each: views into one would be aligned or not by the number of rows, and kernels compiled anew
        total, top = (torch.empty(blocks, rows, dtype=torch.float32, device=device) for _ in range(2))
        return Partials(total, top, torch.empty(blocks, rows, dtype=torch.int32, device=device))


@dataclass(frozen=True)
class RowStates:
    """What the combination of the partials leaves per row.

    Attributes:
        nll, margin, lse: ``[R]`` fp32, 0 on padding rows.
        prediction: ``[R]`` int64, -1 on padding rows.
        scale: ``[R]`` fp32, rho: the gradient of the logits is ``diag(rho) E'``; 0 on padding rows.
        redo: ``[R]`` int32, 1 where E must be written again with the new anchor.
    """

    nll: Tensor
    margin: Tensor
    lse: Tensor
    prediction: Tensor
    scale: Tensor
    redo: Tensor

    @staticmethod
    def empty(rows: int, device: torch.device) -> RowStates:
        """Uninitialised arrays."""
        nll, margin, lse, scale = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(4))
        prediction = torch.empty(rows, dtype=torch.int64, device=device)
        return RowStates(nll, margin, lse, prediction, scale, torch.empty(rows, dtype=torch.int32, device=device))

    def part(self, low: int, high: int) -> RowStates:
        """Rows ``low .. high - 1``, as views."""
        cut = slice(low, high)
        return RowStates(
            self.nll[cut], self.margin[cut], self.lse[cut], self.prediction[cut], self.scale[cut], self.redo[cut]
        )
