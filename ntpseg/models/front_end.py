"""How an image reaches the decoder besides its tokens: a feature of every mask cell, where the cell is predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ntpseg.models.caption import CaptionEncoder
from ntpseg.models.grid import next_cell
from ntpseg.models.pretrained_encoder import PretrainedEncoder
from ntpseg.models.stem import FeatureStem, StemOptions, StemOutput

if TYPE_CHECKING:
    from ntpseg.models.config import NTPSegConfig


class FrontEnd(nn.Module):
    """The front ends ``features`` and ``both``: a `FeatureStem` and the caption's vector that conditions it.

    The feature of a cell is added to the embedding of the token whose hidden state predicts that cell. Where features
    stand at positions of their own, attention has to find the matching one first, which a small model hardly learns
    from a few thousand images.

    Args:
        config: an `NTPSegConfig` with a front end other than ``codes``.
    """

    def __init__(self, config: NTPSegConfig) -> None:
        super().__init__()
        options = StemOptions(**config.stem)
        dim = config.hidden_size
        self.text_size, self.query_token = config.text_size, config.query_token
        self.aligned = options.aligned
        rows, columns = config.mask_grid
        self.mask_cells = rows * columns
        self.image_cells = 0 if config.image_grid is None else config.image_grid[0] * config.image_grid[1]
        self.caption = CaptionEncoder(dim, options.caption_hidden, options.caption_dim) if options.caption_dim else None
        self.stem = FeatureStem(options, config.channels, config.image_size, (rows, columns), dim)

    def load_encoder_weights(self, path: str | Path) -> None:
        """Load a pretrained encoder's weights from this disk, see `PretrainedEncoder.load_weights`.

        Raises:
            ValueError: the encoder is the residual one, which has no pretrained weights, or the weights do not fit.
        """
        encoder = self.stem.encoder
        if not isinstance(encoder, PretrainedEncoder):
            raise ValueError(f"stem.encoder must be a pretrained one for encoder_weights, got 'residual' and {path}")
        encoder.load_weights(path)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, embeds: Tensor, image_of: Tensor | None = None
    ) -> StemOutput:
        """Features and draft of every mask cell.

        Args:
            pixel_values: ``[B, C, S, S]`` float in [-1, 1].
            input_ids: ``[B, T]`` int64, the prompt or more; its text tokens are the caption.
            embeds: ``[B, T, D]``, their embeddings.
            image_of: int64 ``[B]``, which of U images in `pixel_values` each row reads; None: its own.
        """
        caption = None if self.caption is None else self.caption(embeds, input_ids < self.text_size)
        return self.stem(pixel_values.to(embeds.dtype), caption, image_of)

    def inject(self, embeds: Tensor, features: Tensor, input_ids: Tensor, grid_ids: Tensor) -> Tensor:
        """Add to each token the feature of the cell that it is to predict (not aligned: of its own image cell).

        Args:
            embeds: ``[B, T, D]``.
            features: ``[B, cells, D]``.
            input_ids, grid_ids: ``[B, T]`` int64.
        """
        if self.aligned:
            cell = next_cell(grid_ids, input_ids == self.query_token, self.image_cells, self.mask_cells)
        else:
            cell = torch.where((grid_ids > 0) & (grid_ids <= self.image_cells), grid_ids - 1, self.mask_cells)
        # The zero row stands for tokens without a cell.
        rows = torch.nn.functional.pad(features, (0, 0, 0, 1))
        return embeds + rows.gather(1, cell[:, :, None].expand(-1, -1, rows.shape[2])).to(embeds.dtype)
