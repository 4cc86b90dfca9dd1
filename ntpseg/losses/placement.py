"""From compact rows back to the batch: per-token results by the position of the predicted token, gradients by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntpseg.losses.rows import Rows


@dataclass(frozen=True)
class RowPlan:
    """`Rows` with what is needed to turn per-row results into the output, in plain PyTorch.

    `ntpseg.losses.rows_by_kernels` offers the same with kernels.

    Attributes:
        rows: the compacted rows.
        ntp_share: ``[R]``, weight of the row in the CE of head 0.
        shape: B, T, k.
        shift: 1 where head 0 predicts the next position, else 0.
    """

    rows: Rows
    ntp_share: Tensor
    shape: tuple[int, int, int]
    shift: int

    def results(self, prediction: Tensor, nll: Tensor, margin: Tensor, low: int) -> tuple[Tensor, Tensor, Tensor]:
        """``[R]`` results as ``[B, T, k]``; predictions count from `low`, -1 / 0 / 0 where there is no row."""
        prediction = torch.where(self.rows.index < 0, -1, prediction + low)
        return self._by_target(prediction, -1), self._by_target(nll, 0), self._by_target(margin, 0)

    def gradient(self, d_rows: Tensor) -> Tensor:
        """``[R, D]`` as ``[B, T, k, D]``, zero where there is no row."""
        batch, time, heads = self.shape
        cells, slot = self._slots()
        row = (slot % (batch * time)) * heads + slot // (batch * time)
        d_hidden = d_rows.new_zeros(cells + 1, d_rows.shape[1])
        d_hidden[torch.where(self.rows.index < 0, cells, row)] = d_rows
        return d_hidden[:-1].view(*self.shape, d_rows.shape[1])

    def _slots(self) -> tuple[int, Tensor]:
        """Number of cells and the cell of each row; padding rows land in one cell more, which is cut off."""
        batch, time, heads = self.shape
        cells = heads * batch * time
        return cells, torch.where(self.rows.index < 0, cells, self.rows.index)

    def _by_target(self, values: Tensor, empty: int) -> Tensor:
        batch, time, heads = self.shape
        cells, slot = self._slots()
        flat = values.new_full((cells + 1,), empty)
        flat[slot] = values
        by_row = flat[:-1].view(heads, batch, time)
        moved = values.new_full((batch, time, heads), empty)
        for offset in range(self.shift, min(heads + self.shift, time)):
            j = offset - self.shift
            moved[:, offset:, j] = by_row[j, :, : time - offset]
        return moved
