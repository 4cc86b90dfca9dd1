"""What the hard-token memory serves to the loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HardTokens:
    """Hard error tokens of a batch.

    Attributes:
        position: ``[B, n]`` int64, the token position p in the sequence; -1 marks an empty slot.
        token: ``[B, n]`` int64, the wrong token that was predicted there; -1 marks an empty slot.
    """

    position: Tensor
    token: Tensor
