"""Masks in a few forward passes over all cells at once: one pass over blanks, and passes over the last draft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntpseg.generation.decoder import DecodedBatch, Decoder, PromptBatch, TargetTemplate, read_mask

if TYPE_CHECKING:
    from ntpseg.generation.options import DecodingOptions
    from ntpseg.models.heads import NextKHeads


def refine(
    heads: NextKHeads, decoder: Decoder, target: TargetTemplate, prompts: PromptBatch, options: DecodingOptions
) -> DecodedBatch:
    """Draft the whole mask from blanks, then read the last draft and write it anew `options.passes` times.

    The draft that is read is the code nearest to each expected patch. With ``passes=0`` no token is fed back at all.
    """
    assert target.readout is not None
    codes = None
    for _ in range(options.passes + 1):
        hidden = read_mask(decoder, target, prompts, codes)
        logits = heads.logits(hidden.to(heads.weight.dtype), vocab_range=target.code_range)[:, :, 0].float()
        patches = target.readout.expected(logits)
        codes = target.readout.nearest(patches)
    assert codes is not None
    logprob = logits.log_softmax(-1).gather(2, codes[:, :, None])[:, :, 0]
    return DecodedBatch(codes, logprob, options.passes + 1, patches)
