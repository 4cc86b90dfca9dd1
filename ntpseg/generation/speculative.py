"""Self-speculative decoding: heads 1.. draft tokens, head 0 verifies them in one pass; the result is the greedy one.

Blockwise parallel decoding (Stern et al., arXiv 1811.03115) with the model's own k heads. Every row accepts its own
number of tokens, which the cache's per-row positions make free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ntpseg.generation.target import Target, choose


def speculative(
    heads: Any, decoder: Any, target: Target, prompts: list[Tensor], grid_ids: list[Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Decode a batch; arguments and result as in `ntpseg.generation.greedy.greedy`, and `decoder` can ``rewind``.

    The first token of a draft is head 0's own and so always right; token j + 1 of it stands if head 0, having read the
    tokens before it, agrees, or if it is forced.
    """
    span, dtype, k = (target.low, target.high), heads.weight.dtype, heads.k
    batch, last = len(prompts), target.end - 1
    device = target.forced.device
    hidden = decoder.start(prompts, grid_ids, max(map(len, prompts)) + target.end + k)
    # k columns beyond the end take what is drafted past it.
    forced = torch.cat([target.forced[: last + 1], target.forced.new_full((k,), target.low)])
    places = torch.cat([target.cells[: last + 1], target.cells.new_zeros(k)])
    tokens = torch.zeros(batch, last + 1 + k, dtype=torch.int64, device=device)
    scores = torch.zeros(batch, last + 1 + k, device=device)
    offset = torch.arange(k, device=device)
    # Target indices before a row's `done` are final, and `logits` (all k heads) are for index `done` and on.
    done = torch.zeros(batch, dtype=torch.int64, device=device)
    logits = heads.logits(hidden.to(dtype), heads=k, vocab_range=span).float()
    steps = 0
    while True:
        draft = logits.argmax(-1)
        index = done[:, None] + offset
        fixed = forced[index]
        drafted = torch.where(fixed >= 0, fixed, draft + target.low)
        tokens.scatter_(1, index, drafted)
        scores.scatter_(1, index[:, :1], choose(logits[:, :1])[1])
        if int(done.min()) == last:
            break
        hidden = decoder.extend(drafted, places[index])
        steps += 1
        # verdict[:, j] is head 0's choice for the index after draft j; what it rejects is scored again next time.
        verdict, sure = choose(heads.logits(hidden.to(dtype), vocab_range=span)[:, :, 0].float())
        scores.scatter_(1, index[:, 1:], sure[:, :-1])
        agreed = (fixed[:, 1:] >= 0) | (draft[:, 1:] == verdict[:, :-1])
        accepted = torch.minimum(1 + agreed.long().cumprod(1).sum(1), last - done)
        decoder.rewind(k - accepted)
        done = done + accepted
        state = hidden.gather(1, (accepted - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        fresh = heads.logits(state.to(dtype), heads=k, vocab_range=span).float()
        # A finished row stays where it is until the others are done.
        logits = torch.where((accepted == 0)[:, None, None], logits, fresh)
    free = torch.tensor(target.free, device=device)
    return tokens[:, free] - target.low, scores[:, free], float(steps)
