"""Greedy decoding: one forward pass per free token; forced tokens are read together with the token before them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ntpseg.generation.decoder import DecodedBatch, Decoder, PromptBatch, TargetTemplate, greedy_choice

if TYPE_CHECKING:
    from ntpseg.models.heads import NextKHeads


def greedy(heads: NextKHeads, decoder: Decoder, target: TargetTemplate, prompts: PromptBatch) -> DecodedBatch:
    """Decode a batch, see `DecodingMethodFunction`; takes h * w - 1 steps."""
    dtype, low = heads.weight.dtype, target.code_range[0]
    batch, cells = len(prompts), len(target.free)
    hidden = decoder.start(prompts, prompts.max_length + target.end)
    codes = torch.empty(cells, batch, dtype=torch.int64, device=hidden.device)
    logprob = torch.empty(cells, batch, device=hidden.device)
    # What is read at every step: the chosen token's place first, then the forced tokens behind it.
    tokens = target.forced.expand(batch, -1).clone()
    grid_ids = target.grid_ids.expand(batch, -1)
    if target.free[0]:
        hidden = decoder.extend(tokens[:, : target.free[0]], grid_ids[:, : target.free[0]])[:, -1]
    for step, index in enumerate(target.free):
        logits = heads.logits(hidden.to(dtype), vocab_range=target.code_range)[:, 0].float()
        codes[step], logprob[step] = greedy_choice(logits)
        if step + 1 == cells:
            break
        until = target.free[step + 1]
        tokens[:, index] = codes[step] + low
        hidden = decoder.extend(tokens[:, index:until], grid_ids[:, index:until])[:, -1]
    return DecodedBatch(codes.T.contiguous(), logprob.T.contiguous(), cells - 1)
