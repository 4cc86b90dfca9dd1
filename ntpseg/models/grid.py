"""Learned two-dimensional position embeddings of the image's and the mask's token grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GridEmbedding(nn.Module):
    """Adds to each token where it lies in its grid and, for mask tokens, which cell comes next.

    A rotary position says how far apart two tokens are in the sequence, not which cell of the image a mask token
    talks about. Each grid therefore has a row and a column table, added per cell: an image token receives its own cell;
    a mask token its own cell and, from a table of its own, the next cell, the one that its hidden state is to predict;
    the token before the first mask token receives the first cell as next. If both grids have one shape, "next cell" and
    the image's "own cell" are one table, so that looking up the image token of the cell to be predicted is a match of
    equal vectors from the first step on. An embedding depends on its own token alone: decoding needs no look-ahead.

    Args:
        image_grid: ``(rows, columns)``; None where the image is not read as tokens.
        mask_grid: ``(rows, columns)``.
        dim: width D of the model.
    """

    def __init__(self, image_grid: tuple[int, int] | None, mask_grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.image_grid, self.mask_grid = image_grid, mask_grid
        self.shared = image_grid == mask_grid
        if image_grid is not None:
            self.image_rows = nn.Parameter(torch.empty(image_grid[0], dim))
            self.image_columns = nn.Parameter(torch.empty(image_grid[1], dim))
        self.mask_rows = nn.Parameter(torch.empty(mask_grid[0], dim))
        self.mask_columns = nn.Parameter(torch.empty(mask_grid[1], dim))
        if not self.shared:
            self.next_rows = nn.Parameter(torch.empty(mask_grid[0], dim))
            self.next_columns = nn.Parameter(torch.empty(mask_grid[1], dim))

    @property
    def image_cells(self) -> int:
        """Number of cells of the image grid."""
        return 0 if self.image_grid is None else self.image_grid[0] * self.image_grid[1]

    @property
    def cells(self) -> int:
        """Number of cells of both grids."""
        return self.image_cells + self.mask_grid[0] * self.mask_grid[1]

    def table(self) -> Tensor:
        """``[cells + 2, D]``, one row per grid id: row 0 (no cell) is zero, the last is for the token before a mask."""
        mask = _outer_sum(self.mask_rows, self.mask_columns)
        none = mask.new_zeros(1, mask.shape[1])
        image = none[:0] if self.image_grid is None else _outer_sum(self.image_rows, self.image_columns)
        following = image if self.shared else _outer_sum(self.next_rows, self.next_columns)
        return torch.cat([none, image, mask + torch.cat([following[1:], none]), following[:1]])

    def forward(self, grid_ids: Tensor, before_mask: Tensor) -> Tensor:
        """``[B, T, D]`` embeddings of `grid_ids` ``[B, T]`` (int64, see `SequenceFormat.grid_ids`).

        `before_mask` ``[B, T]`` (bool) marks the token before the first mask token.
        """
        return F.embedding(torch.where(before_mask, self.cells + 1, grid_ids), self.table())


def next_cell(grid_ids: Tensor, before_mask: Tensor, image_cells: int, mask_cells: int) -> Tensor:
    """The mask cell 0 .. `mask_cells` - 1 that each token is to predict, `mask_cells` where it predicts none.

    Args:
        grid_ids: ``[B, T]`` int64.
        before_mask: ``[B, T]`` bool, marks the token before the first mask token.
        image_cells, mask_cells: cells of the two grids.

    Returns:
        ``[B, T]`` int64. As with `GridEmbedding` it depends on the token alone.
    """
    cell = torch.where(grid_ids > image_cells, grid_ids - image_cells, mask_cells)
    return torch.where(before_mask, 0, cell)


def _outer_sum(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[:, None] + columns[None]).flatten(0, 1)
