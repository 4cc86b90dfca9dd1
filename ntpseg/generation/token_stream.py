"""Mask tokens while they are decoded, for whoever wants to watch: a page that draws them, a caller that may stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DecodedTokens:
    """Tokens of one mask that are final: they, and those before them, will not change any more.

    Attributes:
        prompt: index of the prompt.
        first: place of the first of them among the mask's h * w cells, row by row.
        codes: int64 ``[n]``, indices into the mask codebook.
        logprob: float32 ``[n]``, log-probability of each among the mask codes.
        patches: float32 ``[n, P * P]``, the expected patch of each; None without a read-out.
    """

    prompt: int
    first: int
    codes: np.ndarray
    logprob: np.ndarray
    patches: np.ndarray | None = None


# Called in the decoding thread, for each prompt in the order of its cells. What it raises ends decoding.
TokenListener = Callable[[DecodedTokens], None]


class TokenSink:
    """What a decoding method tells of a batch; it turns rows of the batch into prompts.

    Args:
        listener: who is told.
        prompts: index of the prompt of each row.
    """

    def __init__(self, listener: TokenListener, prompts: list[int]) -> None:
        self._listener, self._prompts = listener, prompts

    def write(self, row: int, first: int, codes: Tensor, logprob: Tensor, patches: Tensor | None = None) -> None:
        """Tell of n cells of a row from `first`: codes and log-probabilities ``[n]``, patches ``[n, P * P]``."""
        known = None if patches is None else patches.float().cpu().numpy()
        self._listener(
            DecodedTokens(self._prompts[row], first, codes.cpu().numpy(), logprob.float().cpu().numpy(), known)
        )
