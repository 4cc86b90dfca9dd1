"""Self-speculative decoding: heads 1.. draft tokens, head 0 verifies them in one pass; the result is the greedy one.

Blockwise parallel decoding (Stern et al., arXiv 1811.03115) with the model's own k heads. Every row accepts its own
number of tokens, which the cache's per-row positions make free.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ntpseg.generation.decoder import (
    DecodedBatch,
    Decoder,
    PromptBatch,
    RewindableDecoder,
    TargetTemplate,
    greedy_choice,
)

if TYPE_CHECKING:
    from ntpseg.generation.options import DecodingOptions
    from ntpseg.generation.token_stream import TokenSink
    from ntpseg.models.heads import NextKHeads


def speculative(
    heads: NextKHeads,
    decoder: Decoder,
    target: TargetTemplate,
    prompts: PromptBatch,
    options: DecodingOptions,
    sink: TokenSink | None = None,
) -> DecodedBatch:
    """Decode a batch, see `StreamingMethodFunction`; `decoder` is a `RewindableDecoder`.

    The first token of a draft is head 0's own and so always right; token j + 1 of it is accepted if head 0, having read
    the tokens before it, agrees, or if it is forced.
    """
    rewindable = cast(RewindableDecoder, decoder)
    dtype, k, low = heads.weight.dtype, heads.k, target.code_range[0]
    batch, last = len(prompts), target.end - 1
    device = target.forced.device
    hidden = rewindable.start(prompts, prompts.max_length + target.end + k)
    # k columns beyond the end take what is drafted past it.
    forced = torch.cat([target.forced[: last + 1], target.forced.new_full((k,), low)])
    grid_ids = torch.cat([target.grid_ids[: last + 1], target.grid_ids.new_zeros(k)])
    tokens = torch.zeros(batch, last + 1 + k, dtype=torch.int64, device=device)
    logprob = torch.zeros(batch, last + 1 + k, device=device)
    readout = target.readout if options.expected_readout else None
    patches = None if readout is None else torch.zeros(batch, last + 1 + k, readout.patches.shape[1], device=device)

    def score(index: Tensor, logits: Tensor) -> None:
        """Record what head 0's `logits` ``[B, n, V]`` say about the tokens at `index` ``[B, n]``."""
        logprob.scatter_(1, index, greedy_choice(logits)[1])
        if readout is not None and patches is not None:
            patches.scatter_(1, index[:, :, None].expand(-1, -1, patches.shape[2]), readout.expected(logits))

    free = torch.tensor(target.free, device=device)
    # Cells that `sink` has been told of, of each row.
    told = [0] * batch

    def tell(until: list[int]) -> None:
        """Write the cells before each row's target index `until`."""
        for row, end in enumerate(until):
            first, cells = told[row], bisect.bisect_left(target.free, end)
            if sink is not None and cells > first:
                here = free[first:cells]
                known = None if patches is None else patches[row, here]
                sink.write(row, first, tokens[row, here] - low, logprob[row, here], known)
            told[row] = cells

    offset = torch.arange(k, device=device)
    # Target indices before a row's `done` are final, and `logits` (all k heads) are for index `done` and on.
    done = torch.zeros(batch, dtype=torch.int64, device=device)
    logits = heads.logits(hidden.to(dtype), heads=k, vocab_range=target.code_range).float()
    steps = 0
    while True:
        draft = logits.argmax(-1)
        index = done[:, None] + offset
        forced_here = forced[index]
        drafted = torch.where(forced_here >= 0, forced_here, draft + low)
        tokens.scatter_(1, index, drafted)
        score(index[:, :1], logits[:, :1])
        if int(done.min()) == last:
            if sink is not None:
                tell([last + 1] * batch)
            break
        hidden = rewindable.extend(drafted, grid_ids[index])
        steps += 1
        # verified[:, j] is head 0's choice for the index after draft j; what it rejects is scored again next time.
        checked = heads.logits(hidden.to(dtype), vocab_range=target.code_range)[:, :, 0].float()
        verified = checked.argmax(-1)
        score(index[:, 1:], checked[:, :-1])
        agreed = (forced_here[:, 1:] >= 0) | (draft[:, 1:] == verified[:, :-1])
        accepted = torch.minimum(1 + agreed.long().cumprod(1).sum(1), last - done)
        rewindable.rewind(k - accepted)
        done = done + accepted
        if sink is not None:
            tell(done.tolist())
        state = hidden.gather(1, (accepted - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        next_logits = heads.logits(state.to(dtype), heads=k, vocab_range=target.code_range).float()
        # A finished row stays where it is until the others are done.
        logits = torch.where((accepted == 0)[:, None, None], logits, next_logits)
    expected_patches = None if patches is None else patches[:, free]
    return DecodedBatch(tokens[:, free] - low, logprob[:, free], steps, expected_patches)
