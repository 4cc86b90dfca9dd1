"""Greedy decoding: one forward pass per free token; forced tokens ride along with the token before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ntpseg.generation.target import Target, choose


def greedy(
    heads: Any, decoder: Any, target: Target, prompts: list[Tensor], grid_ids: list[Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Decode a batch.

    Args:
        heads: `NextKHeads`; head 0 chooses.
        decoder: has ``start(prompts, grid_ids, capacity) -> [B, D]`` and ``extend(tokens, grid_ids) -> [B, q, D]``.
        target: see `Target`.
        prompts, grid_ids: int64 ``[P_b]`` each.

    Returns:
        Codes int64 ``[B, h * w]``, log-probabilities float32 ``[B, h * w]``, and the number of steps.
    """
    span, dtype = (target.low, target.high), heads.weight.dtype
    batch, cells = len(prompts), len(target.free)
    hidden = decoder.start(prompts, grid_ids, max(map(len, prompts)) + target.end)
    codes = torch.empty(cells, batch, dtype=torch.int64, device=hidden.device)
    scores = torch.empty(cells, batch, device=hidden.device)
    # The forced tokens and grid ids of every step, the chosen token's place first.
    tokens = target.forced.expand(batch, -1).clone()
    places = target.cells.expand(batch, -1)
    if target.free[0]:
        hidden = decoder.extend(tokens[:, : target.free[0]], places[:, : target.free[0]])[:, -1]
    for step, index in enumerate(target.free):
        logits = heads.logits(hidden.to(dtype), vocab_range=span)[:, 0].float()
        codes[step], scores[step] = choose(logits)
        if step + 1 == cells:
            break
        until = target.free[step + 1]
        tokens[:, index] = codes[step] + target.low
        hidden = decoder.extend(tokens[:, index:until], places[:, index:until])[:, -1]
    return codes.T.contiguous(), scores.T.contiguous(), float(cells - 1)
