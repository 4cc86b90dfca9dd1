"""Several masks drawn code by code, and their mean: the marginal probability of every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ntpseg.generation.decoder import DecodedBatch, Decoder, PromptBatch, TargetTemplate
from ntpseg.generation.greedy import decode_in_order

if TYPE_CHECKING:
    from ntpseg.generation.options import DecodingOptions
    from ntpseg.models.heads import NextKHeads
    from ntpseg.models.readout import PatchReadout


def sample(
    heads: NextKHeads, decoder: Decoder, target: TargetTemplate, prompts: PromptBatch, options: DecodingOptions
) -> DecodedBatch:
    """Draw `options.samples` masks of every prompt and average their expected patches.

    As many samples are decoded together as keep the batch within `options.batch_size` rows. A sample depends on the
    seed, its number and its prompt alone: not on how many samples there are, nor on what it is decoded with.

    The codes are the ones nearest to the mean patches, their log-probabilities the mean over the samples; without a
    read-out they are those of the sample that the model finds likeliest.
    """
    count = len(prompts)
    together = max(1, options.batch_size // count)
    all_codes, all_logprob, steps, total = [], [], 0, None
    for first in range(0, options.samples, together):
        numbers = range(first, min(first + together, options.samples))
        draw = _Draw(options, numbers, target.readout)
        # Only their number and the longest are looked at: the prompts themselves are read once.
        rows = PromptBatch(prompts.ids * len(numbers), prompts.grid_ids * len(numbers))
        batch = decode_in_order(heads, _ReadOnce(decoder, prompts, len(numbers)), target, rows, draw)
        all_codes.append(batch.codes.unflatten(0, (-1, count)))
        all_logprob.append(batch.logprob.unflatten(0, (-1, count)))
        steps += batch.steps
        if (patches := draw.patches(batch)) is not None:
            # One after the other, so that the sum is the same however many are decoded together.
            for part in patches.unflatten(0, (-1, count)):
                total = part if total is None else total + part
    codes, logprob = torch.cat(all_codes), torch.cat(all_logprob)
    samples = codes.transpose(0, 1)
    if total is None or target.readout is None:
        likeliest = logprob.sum(-1).argmax(0), torch.arange(count, device=codes.device)
        return DecodedBatch(codes[likeliest], logprob[likeliest], steps, samples=samples)
    mean = total / options.samples
    return DecodedBatch(target.readout.nearest(mean), logprob.mean(0), steps, mean, samples)


def tempered(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The logits of the distribution that codes are drawn from.

    Args:
        logits: float32 ``[..., V]``.
        temperature: divides them; below 1 the likely becomes likelier.
        top_p: nucleus sampling (Holtzman et al., ICLR 2020, arXiv 1904.09751): only the likeliest codes that together
            reach this probability may be drawn, the one that reaches it among them; 1 keeps all.

    Returns:
        float32 ``[..., V]``; -inf for codes that cannot be drawn.
    """
    if temperature != 1:
        logits = logits / temperature
    if top_p >= 1:
        return logits
    probability, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    # The sum before each code: the first is always kept.
    left_out = probability.cumsum(-1) - probability >= top_p
    return logits.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), -torch.inf)


class _Draw:
    """Chooses the codes of several samples of each prompt; rows are sample after sample.

    A code is drawn as the largest of logits plus Gumbel noise. Each sample has a stream of noise of its own, which all
    prompts share: that makes a row independent of its batch, and one sample of neighbouring slices a volume that hangs
    together. It is drawn on the CPU, so that a GPU gives the same masks.
    """

    def __init__(self, options: DecodingOptions, numbers: Sequence[int], readout: PatchReadout | None) -> None:
        self._temperature, self._top_p, self._readout = options.temperature, options.top_p, readout
        self._changed = options.temperature != 1 or options.top_p < 1
        self._streams = [np.random.default_rng([options.seed, number]) for number in numbers]
        self._patches: list[Tensor] = []

    def __call__(self, logits: Tensor) -> Tensor:
        allowed = tempered(logits, self._temperature, self._top_p)
        if self._readout is not None and self._changed:
            self._patches.append(self._readout.expected(allowed))
        noise = torch.from_numpy(np.stack([stream.gumbel(size=logits.shape[-1]) for stream in self._streams]))
        rows = allowed.unflatten(0, (len(self._streams), -1))
        return (rows + noise.to(logits.device, logits.dtype)[:, None]).argmax(-1).flatten()

    def patches(self, batch: DecodedBatch) -> Tensor | None:
        """The expected patches of the distribution that was drawn from, ``[rows, h * w, P * P]``."""
        return torch.stack(self._patches, 1) if self._patches else batch.patches


class _ReadOnce:
    """A `Decoder` that reads B prompts and continues each of them several times.

    Args:
        decoder: the decoder.
        prompts: B prompts.
        times: how often; there are ``times * B`` rows.
    """

    def __init__(self, decoder: Decoder, prompts: PromptBatch, times: int) -> None:
        self._decoder, self._prompts, self._times = decoder, prompts, times
        self.dtype, self.extend, self.repeat = decoder.dtype, decoder.extend, decoder.repeat

    def start(self, prompts: PromptBatch, capacity: int) -> Tensor:
        """See `Decoder.start`; `prompts` are the rows."""
        hidden = self._decoder.start(self._prompts, capacity)
        if self._times > 1:
            self._decoder.repeat(self._times)
        return hidden.repeat(self._times, 1)
