"""What a decoding method works with: prompts, the decoder that reads them, the target that it fills, its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ntpseg.generation.options import DecodingOptions
    from ntpseg.generation.token_stream import TokenSink
    from ntpseg.models.heads import NextKHeads
    from ntpseg.models.readout import PatchReadout
    from ntpseg.models.stem import StemOutput
    from ntpseg.tokenizers.sequence import SequenceFormat


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of B masks that are decoded together.

    Attributes:
        ids: int64 ``[P_b]`` each, of any lengths.
        grid_ids: int64 ``[P_b]`` each, the grid cell of every token, see `SequenceFormat.grid_ids`.
        stem: features of the images, for models with a stem.
    """

    ids: list[Tensor]
    grid_ids: list[Tensor]
    stem: StemOutput | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids))


class Decoder(Protocol):
    """A model with a key-value cache. It reads a batch of prompts, then tokens, and returns hidden states.

    Attributes:
        dtype: of the matrix products.
    """

    dtype: torch.dtype

    def start(self, prompts: PromptBatch, capacity: int) -> Tensor:
        """Read the prompts into an empty cache.

        Args:
            prompts: B prompts.
            capacity: tokens of the longest sequence there will be, prompt included.

        Returns:
            float32 ``[B, D]``: the final hidden state of each prompt's last token.
        """
        ...

    def extend(self, tokens: Tensor, grid_ids: Tensor) -> Tensor:
        """Append q tokens to every row.

        Args:
            tokens, grid_ids: int64 ``[B, q]``.

        Returns:
            float32 ``[B, q, D]``: their final hidden states.
        """
        ...

    def repeat(self, times: int) -> None:
        """Continue every row `times` times: the B rows, then the B rows again and so on, with what they have read."""
        ...


class RewindableDecoder(Decoder, Protocol):
    """A `Decoder` that can take tokens back, each row its own number of them."""

    def rewind(self, tokens: Tensor) -> None:
        """Remove the last `tokens` (int64 ``[B]``) of each row from the cache."""
        ...

    def start_with(self, prompts: PromptBatch, capacity: int, tokens: Tensor, grid_ids: Tensor) -> Tensor:
        """`start` and `extend` by q tokens in one forward pass.

        Args:
            prompts, capacity: see `start`.
            tokens, grid_ids: int64 ``[B, q]``.

        Returns:
            float32 ``[B, q + 1, D]``: the final hidden states of each prompt's last token and of the q tokens.
        """
        ...

    def extend_ragged(self, counts: Sequence[int], tokens: Tensor, grid_ids: Tensor) -> Tensor:
        """Append to every row its own number of tokens.

        Args:
            counts: of each of the B rows; 0 leaves a row out of the pass.
            tokens, grid_ids: int64 ``[N]``, those of row 0, then those of row 1 ...; N is the sum of `counts`, >= 1.

        Returns:
            float32 ``[N, D]``: their final hidden states.
        """
        ...


@dataclass(frozen=True)
class DecodedBatch:
    """The masks of a batch of B prompts.

    Attributes:
        codes: int64 ``[B, h * w]``, indices into the mask codebook.
        logprob: float32 ``[B, h * w]``, log-probability of each code among the mask codes.
        steps: forward passes after the prompt.
        patches: float32 ``[B, h * w, P * P]``, the expected patch of each cell; None without a read-out.
        samples: int64 ``[B, n, h * w]``, the codes of every sample, of methods that draw several.
    """

    codes: Tensor
    logprob: Tensor
    steps: int
    patches: Tensor | None = None
    samples: Tensor | None = None


class DecodingMethodFunction(Protocol):
    """The implementation of a `DecodingMethod`."""

    def __call__(
        self,
        heads: NextKHeads,
        decoder: Decoder,
        target: TargetTemplate,
        prompts: PromptBatch,
        options: DecodingOptions,
    ) -> DecodedBatch:
        """Decode the masks of `prompts`; head 0 of `heads` decides."""
        ...


class StreamingMethodFunction(Protocol):
    """The implementation of a `DecodingMethod` that ``streams``: it tells of each token as soon as that is final."""

    def __call__(
        self,
        heads: NextKHeads,
        decoder: Decoder,
        target: TargetTemplate,
        prompts: PromptBatch,
        options: DecodingOptions,
        sink: TokenSink | None = None,
    ) -> DecodedBatch:
        """See `DecodingMethodFunction`; every cell of every row is written to `sink` once, in order."""
        ...


class TargetTemplate:
    """The target of a `SequenceFormat` on a device: which tokens are forced, and the grid cell of each.

    Args:
        sequence: the sequence format.
        device: where the tensors are.
        readout: the model's, for expected patches; None without one.
        blank: id that stands for a mask token that is not known.
        draft: where a model has a draft of a whole mask: "stem", "blanks" (it was trained to read them) or None.

    Attributes:
        code_range: half-open id range of the mask codes.
        forced: int64 ``[M]``, the id forced at each target index, -1 where a mask code is free.
        grid_ids: int64 ``[M]``, the grid id of each target index.
        free: the free target indices in order, one per grid cell.
        end: target index after the last free one; what follows is forced and never read.
        columns: cells of a row of the mask's grid.
        readout, blank, draft: as given.
    """

    def __init__(
        self,
        sequence: SequenceFormat,
        device: torch.device,
        readout: PatchReadout | None = None,
        blank: int = -1,
        draft: Literal["stem", "blanks"] | None = None,
    ) -> None:
        self.readout, self.blank, self.draft = readout, blank, draft
        self.columns = sequence.mask_grid[1]
        forced = [sequence.forced(i) for i in range(sequence.num_target)]
        self.code_range = sequence.vocabulary.mask_range
        self.forced = torch.tensor([-1 if token is None else token for token in forced], device=device)
        self.grid_ids = torch.as_tensor(sequence.target_grid_ids, device=device)
        self.free = [i for i, token in enumerate(forced) if token is None]
        self.end = self.free[-1] + 1


def greedy_choice(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest class of ``[..., V]`` float logits and its log-probability, both ``[...]``; ties to the lowest."""
    maximum, index = logits.max(-1)
    return index, maximum - logits.logsumexp(-1)


def read_mask(decoder: Decoder, target: TargetTemplate, prompts: PromptBatch, codes: Tensor | None) -> Tensor:
    """One forward pass over the prompts and a whole mask.

    Args:
        decoder: started anew.
        target: the target.
        prompts: B prompts.
        codes: int64 ``[B, h * w]``, the mask that is read; None reads blanks.

    Returns:
        float32 ``[B, h * w, D]``: for each cell the hidden state that predicts it, having read the cells before it.
    """
    free = torch.tensor(target.free, device=target.forced.device)
    tokens = target.forced[: target.end].expand(len(prompts), -1).clone()
    tokens[:, free] = target.blank if codes is None else codes + target.code_range[0]
    hidden = decoder.start(prompts, prompts.max_length + target.end)[:, None]
    if target.end > 1:
        grid_ids = target.grid_ids[: target.end - 1].expand(len(prompts), -1)
        hidden = torch.cat([hidden, decoder.extend(tokens[:, :-1], grid_ids)], 1)
    return hidden[:, free]
