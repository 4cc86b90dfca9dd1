"""The mean of several sampled masks: the marginal probability of every pixel under the joint distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ntpseg.generation.decoder import DecodedBatch, Decoder, PromptBatch, TargetTemplate
from ntpseg.generation.greedy import decode_in_order

if TYPE_CHECKING:
    from ntpseg.generation.options import DecodingOptions
    from ntpseg.models.heads import NextKHeads


def sample(
    heads: NextKHeads, decoder: Decoder, target: TargetTemplate, prompts: PromptBatch, options: DecodingOptions
) -> DecodedBatch:
    """Average the expected patches of `options.samples` masks that are drawn code by code.

    The codes are the ones nearest to the averages, their log-probabilities the mean over the samples.
    """
    assert target.readout is not None
    device = target.forced.device
    # One generator for the whole call: a mask depends on the seed and on what it is batched with.
    generator = torch.Generator(device).manual_seed(options.seed)

    def draw(logits: Tensor) -> Tensor:
        # Of a NaN any code is drawn: the log-probability tells, where an error here would end a CUDA context.
        probability = (logits / options.temperature).softmax(-1).nan_to_num(nan=1.0)
        return torch.multinomial(probability, 1, generator=generator)[:, 0]

    drawn = [decode_in_order(heads, decoder, target, prompts, draw) for _ in range(options.samples)]
    patches = torch.stack([batch.patches for batch in drawn if batch.patches is not None]).mean(0)
    logprob = torch.stack([batch.logprob for batch in drawn]).mean(0)
    return DecodedBatch(target.readout.nearest(patches), logprob, sum(batch.steps for batch in drawn), patches)
