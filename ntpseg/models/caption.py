"""The caption as one vector, for conditioning convolutions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class CaptionEncoder(nn.Module):
    """A convolution over the embeddings of the text tokens and their neighbours, averaged: a soft bag of trigrams.

    Args:
        dim: width D of the token embeddings.
        hidden: channels of the convolution.
        caption_dim: E, length of the vector.
    """

    def __init__(self, dim: int, hidden: int, caption_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, hidden, 3, padding=1)
        self.project = nn.Linear(hidden, caption_dim)

    def forward(self, embeds: Tensor, is_text: Tensor) -> Tensor:
        """``[B, E]`` of token embeddings ``[B, T, D]``; `is_text` ``[B, T]`` (bool) marks the caption's tokens."""
        weight = is_text[:, :, None].to(embeds.dtype)
        # Embeddings start with a standard deviation of about 0.02, convolutions want 1.
        tokens = F.rms_norm(embeds, embeds.shape[-1:]) * weight
        hidden = F.relu(self.conv(tokens.transpose(1, 2))).transpose(1, 2)
        return self.project((hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0))
