"""Inference through the model's own forward and Hugging Face's dynamic cache: any attention, any decoder."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


class HuggingFaceDecoder:
    """The generic path: prompts are padded on the left, masked, and given their own positions.

    Args:
        model: an `NTPSegModel`.
        dtype: autocast runs the matrix products in it where it is not the model's own.
        pad: token id that fills the left of shorter prompts.
    """

    def __init__(self, model: Any, dtype: torch.dtype, pad: int) -> None:
        self.model, self.dtype, self.pad = model, dtype, pad
        self.device = next(model.parameters()).device
        self.own = next(model.parameters()).dtype

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == self.own:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def start(self, prompts: list[Tensor], grid_ids: list[Tensor], capacity: int) -> Tensor:
        """Read prompts of any lengths (int64 each, with grid ids); float32 ``[B, D]`` of each one's last token."""
        longest = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), longest), self.pad, device=self.device)
        grid, self.mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (prompt, cells) in enumerate(zip(prompts, grid_ids, strict=True)):
            ids[row, longest - len(prompt) :] = prompt
            grid[row, longest - len(prompt) :] = cells
            self.mask[row, longest - len(prompt) :] = 1
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache = None
        hidden = self._forward(ids, grid, self.positions)
        self.positions = self.positions[:, -1:]
        return hidden[:, -1]

    def extend(self, tokens: Tensor, grid_ids: Tensor) -> Tensor:
        """Append ``[B, q]`` tokens; float32 ``[B, q, D]``."""
        new = tokens.shape[1]
        positions = self.positions + torch.arange(1, new + 1, device=self.device)
        self.positions = positions[:, -1:]
        self.mask = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], 1)
        return self._forward(tokens, grid_ids, positions)

    def _forward(self, ids: Tensor, grid_ids: Tensor, positions: Tensor) -> Tensor:
        with self._autocast():
            out = self.model(
                ids,
                grid_ids=grid_ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache = out.past_key_values
        return out.last_hidden_state.float()
