"""What decoding must know of the target: which tokens are forced, and where each one lies in the grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Target:
    """The target of a `SequenceFormat` on a device.

    Attributes:
        low, high: id range of the mask codes.
        forced: int64 ``[M]``, the id forced at each target index, -1 where a code is free.
        cells: int64 ``[M]``, the grid id of each target index.
        free: the free target indices in order, one per grid cell.
        end: target index after the last free one; what follows is forced and never read.
    """

    def __init__(self, sequence: Any, device: torch.device) -> None:
        forced = [sequence.forced(i) for i in range(sequence.num_target)]
        self.low, self.high = sequence.vocabulary.mask_range
        self.forced = torch.tensor([-1 if token is None else token for token in forced], device=device)
        self.cells = torch.as_tensor(sequence.target_grid_ids, device=device)
        self.free = [i for i, token in enumerate(forced) if token is None]
        self.end = self.free[-1] + 1


def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest class of ``[..., V]`` float logits and its log-probability, both ``[...]``; ties to the lowest."""
    best, index = logits.max(-1)
    return index, best - logits.logsumexp(-1)
