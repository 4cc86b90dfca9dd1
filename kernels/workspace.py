"""Per-row arrays that travel between the kernels of one chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Anchors:
    """What E is measured from.

    Attributes:
        target_logit: ``[R]`` fp32, z_y, natural units; 0 on padding rows.
        anchor: ``[R]`` fp32, ``E = exp2(z * log2(e) - anchor)``; rewritten for rows whose E is recomputed.
        limit: ``[R]`` fp32, the logit above which a row's E must be recomputed.
    """

    target_logit: Tensor
    anchor: Tensor
    limit: Tensor

    def __getitem__(self, rows: slice) -> Anchors:
        """Some rows, as views."""
        return Anchors(self.target_logit[rows], self.anchor[rows], self.limit[rows])


@dataclass(frozen=True)
class BlockStats:
    """Row statistics of each vocabulary block: plain stores and a fixed order of summation, no atomics.

    Attributes:
        row_sum: ``[blocks, R]`` fp32, sum of E over the block (relative to the block's maximum where that is above
            limit).
        row_max: ``[blocks, R]`` fp32, largest logit.
        argmax: ``[blocks, R]`` int32, lowest class id that has it.
    """

    row_sum: Tensor
    row_max: Tensor
    argmax: Tensor

    @staticmethod
    def empty(blocks: int, rows: int, device: torch.device) -> BlockStats:
        """Uninitialised arrays: every entry is written before it is read."""
        # one allocation each: views into one would be aligned or not by the number of rows, and kernels compiled anew
        row_sum, row_max = (torch.empty(blocks, rows, dtype=torch.float32, device=device) for _ in range(2))
        return BlockStats(row_sum, row_max, torch.empty(blocks, rows, dtype=torch.int32, device=device))

    def first(self, rows: int) -> BlockStats:
        """Those of the first rows, as views: all three keep the stride between blocks."""
        return BlockStats(self.row_sum[:, :rows], self.row_max[:, :rows], self.argmax[:, :rows])


@dataclass(frozen=True)
class RowStats:
    """What the reduction over the blocks leaves per row.

    Attributes:
        nll, margin, lse: ``[R]`` fp32, 0 on padding rows.
        prediction: ``[R]`` int64, -1 on padding rows.
        scale: ``[R]`` fp32, rho: the gradient of the logits is ``diag(rho) E'``; 0 on padding rows.
        recompute: ``[R]`` int32, 1 where E must be written again with the new anchor.
    """

    nll: Tensor
    margin: Tensor
    lse: Tensor
    prediction: Tensor
    scale: Tensor
    recompute: Tensor

    @staticmethod
    def empty(rows: int, device: torch.device) -> RowStats:
        """Uninitialised arrays."""
        nll, margin, lse, scale = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(4))
        prediction = torch.empty(rows, dtype=torch.int64, device=device)
        return RowStats(nll, margin, lse, prediction, scale, torch.empty(rows, dtype=torch.int32, device=device))

    def __getitem__(self, rows: slice) -> RowStats:
        """Some rows, as views."""
        return RowStats(
            self.nll[rows],
            self.margin[rows],
            self.lse[rows],
            self.prediction[rows],
            self.scale[rows],
            self.recompute[rows],
        )


@dataclass(frozen=True)
class LossWeights:
    """The factors of the loss that enter a row's gradient.

    Attributes:
        row_weight: ``[R]`` fp32, weight of the row in CE and TCL.
        entry_weight: 0-dim fp32, weight of one hard token in HET (het_weight not included).
        tcl_weight, het_weight, z_loss, temperature: see `ntpseg.losses.LossOptions`.
    """

    row_weight: Tensor
    entry_weight: Tensor
    tcl_weight: float
    het_weight: float
    z_loss: float
    temperature: float

    def __getitem__(self, rows: slice) -> LossWeights:
        """Those of some rows, as views."""
        return replace(self, row_weight=self.row_weight[rows])
