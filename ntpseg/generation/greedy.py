"""Decoding in order: one forward pass per free token; forced tokens are read together with the token before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntpseg.generation.decoder import DecodedBatch, Decoder, PromptBatch, TargetTemplate

if TYPE_CHECKING:
    from ntpseg.generation.options import DecodingOptions
    from ntpseg.generation.token_stream import TokenSink
    from ntpseg.models.heads import NextKHeads


def greedy(
    heads: NextKHeads,
    decoder: Decoder,
    target: TargetTemplate,
    prompts: PromptBatch,
    options: DecodingOptions,
    sink: TokenSink | None = None,
) -> DecodedBatch:
    """Feed the likeliest code back, see `StreamingMethodFunction`; takes h * w - 1 steps."""
    read_out = options.expected_readout or sink is not None
    return decode_in_order(heads, decoder, target, prompts, lambda logits: logits.argmax(-1), sink, read_out)


def expected(
    heads: NextKHeads,
    decoder: Decoder,
    target: TargetTemplate,
    prompts: PromptBatch,
    options: DecodingOptions,
    sink: TokenSink | None = None,
) -> DecodedBatch:
    """Feed the code nearest to the expected patch back; takes h * w - 1 steps.

    The likeliest code of an uncertain patch is often the empty one, and what follows an empty patch is empty: the
    likeliest sequence loses whole lesions that the marginal probabilities hold (``docs/results.md``).
    """
    readout = target.readout
    assert readout is not None
    return decode_in_order(
        heads, decoder, target, prompts, lambda logits: readout.nearest(readout.expected(logits)), sink
    )


def decode_in_order(
    heads: NextKHeads,
    decoder: Decoder,
    target: TargetTemplate,
    prompts: PromptBatch,
    choose: Callable[[Tensor], Tensor],
    sink: TokenSink | None = None,
    read_out: bool = True,
) -> DecodedBatch:
    """Decode a batch cell by cell.

    Args:
        heads, decoder, target, prompts, sink: see `StreamingMethodFunction`.
        choose: the codes int64 ``[B]`` that are fed back, of float32 logits ``[B, V]``.
        read_out: make the expected patches where the model has a read-out.
    """
    readout = target.readout if read_out else None
    dtype, low = heads.weight.dtype, target.code_range[0]
    batch, cells = len(prompts), len(target.free)
    hidden = decoder.start(prompts, prompts.max_length + target.end)
    codes = torch.empty(cells, batch, dtype=torch.int64, device=hidden.device)
    logprob = torch.empty(cells, batch, device=hidden.device)
    patches = []
    # What is read at every step: the chosen token's place first, then the forced tokens behind it.
    tokens = target.forced.expand(batch, -1).clone()
    grid_ids = target.grid_ids.expand(batch, -1)
    if target.free[0]:
        hidden = decoder.extend(tokens[:, : target.free[0]], grid_ids[:, : target.free[0]])[:, -1]
    for step, index in enumerate(target.free):
        logits = heads.logits(hidden.to(dtype), vocab_range=target.code_range)[:, 0].float()
        codes[step] = choose(logits)
        logprob[step] = logits.log_softmax(-1).gather(1, codes[step][:, None])[:, 0]
        if readout is not None:
            patches.append(readout.expected(logits))
        if sink is not None:
            for row in range(batch):
                known = patches[step][row, None] if patches else None
                sink.write(row, step, codes[step, row, None], logprob[step, row, None], known)
        if step + 1 == cells:
            break
        until = target.free[step + 1]
        tokens[:, index] = codes[step] + low
        hidden = decoder.extend(tokens[:, index:until], grid_ids[:, index:until])[:, -1]
    expected_patches = torch.stack(patches, 1) if patches else None
    return DecodedBatch(codes.T.contiguous(), logprob.T.contiguous(), cells - 1, expected_patches)
