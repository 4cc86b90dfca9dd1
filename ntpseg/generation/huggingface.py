"""`HuggingFaceDecoder`: inference through the model's own forward and Hugging Face's dynamic cache."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ntpseg.generation.decoder import PromptBatch


class HuggingFaceDecoder:
    """A `Decoder` for any attention and any backbone: prompts are padded on the left, masked, with their own positions.

    Args:
        model: an `NTPSegModel`.
        dtype: autocast runs the matrix products in it where it is not the model's own.
        pad: token id that fills the left of shorter prompts.
    """

    def __init__(self, model: Any, dtype: torch.dtype, pad: int) -> None:
        self.model, self.dtype, self.pad = model, dtype, pad
        self.device = next(model.parameters()).device
        self.model_dtype = next(model.parameters()).dtype

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == self.model_dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def start(self, prompts: PromptBatch, capacity: int) -> Tensor:
        """See `Decoder.start`; the cache grows by itself."""
        longest = prompts.max_length
        ids = torch.full((len(prompts), longest), self.pad, device=self.device)
        grid, self.mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (prompt, cells) in enumerate(zip(prompts.ids, prompts.grid_ids, strict=True)):
            ids[row, longest - len(prompt) :] = prompt
            grid[row, longest - len(prompt) :] = cells
            self.mask[row, longest - len(prompt) :] = 1
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache: Any = None
        self.stem = prompts.stem
        hidden = self._forward(ids, grid, self.positions)
        self.positions = self.positions[:, -1:]
        return hidden[:, -1]

    def extend(self, tokens: Tensor, grid_ids: Tensor) -> Tensor:
        """See `Decoder.extend`."""
        new = tokens.shape[1]
        positions = self.positions + torch.arange(1, new + 1, device=self.device)
        self.positions = positions[:, -1:]
        self.mask = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], 1)
        return self._forward(tokens, grid_ids, positions)

    def repeat(self, times: int) -> None:
        """See `Decoder.repeat`."""
        if self.cache is not None:
            rows = torch.arange(len(self.mask), device=self.device).repeat(times)
            self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask.repeat(times, 1), self.positions.repeat(times, 1)
        if self.stem is not None:
            self.stem = type(self.stem)(*(part.repeat(times, *[1] * (part.ndim - 1)) for part in self.stem))

    def _forward(self, ids: Tensor, grid_ids: Tensor, positions: Tensor) -> Tensor:
        with self._autocast():
            out = self.model(
                ids,
                grid_ids=grid_ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                stem_output=self.stem,
            )
        self.cache = out.past_key_values
        return out.last_hidden_state.float()
