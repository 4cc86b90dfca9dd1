"""Steps that must not be taken: a loss or a gradient that is not finite, or no label to learn from.

Such a step is skipped by all ranks alike: weights, optimizer, average and hard-token memory stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ntpseg.utils.finite import non_finite_tensor

CURE = "lower training.learning_rate, or set training.max_grad_norm"
_SHOWN_SAMPLES = 32


class TrainingDiverged(ValueError):
    """Training cannot go on, or its result cannot be used; the text is one line that says what to do."""


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch of a step brought, kept until the step is known to count.

    Attributes:
        sample_ids: int64 ``[B]``.
        labels, prediction, nll, margin: ``[B, T]``, see `NTPSegOutput`.
        values: float64 ``[1 + terms]``: the loss and its terms.
    """

    sample_ids: Tensor
    labels: Tensor
    prediction: Tensor
    nll: Tensor
    margin: Tensor
    values: Tensor

    def culprits(self) -> list[int]:
        """The supervised samples whose tokens have a loss that is not finite; all of them where none has."""
        supervised = (self.labels != -100).any(1)
        odd = supervised & ~(self.nll.isfinite() & self.margin.isfinite()).all(1)
        return self.sample_ids[odd if bool(odd.any()) else supervised].tolist()


def judge_step(
    batches: Sequence[MicroBatch],
    names: Sequence[str],
    norm: Tensor | float | None,
    supervised: Tensor,
    *,
    world_size: int = 1,
    signal: int = 0,
) -> tuple[str | None, int]:
    """Why a step must be skipped, the same text on every rank, None where it counts; and whether training must end.

    Looks at the device once, and reduces over the ranks once.

    Args:
        batches: this rank's part of the step.
        names: of their values.
        norm: of the gradient; None: is not looked at, as where a loss scaler does.
        supervised: 0-dim, supervised rows of the whole step over all ranks.
        world_size: the number of ranks.
        signal: number of the signal that asked this rank to end, 0 = none.

    Returns:
        The reason, and the largest `signal` of any rank.
    """
    flags = torch.zeros(4, device=supervised.device)
    if batches:
        flags[0] = 1.0 - torch.stack([batch.values for batch in batches]).isfinite().all().to(flags)
    if norm is not None:
        flags[1] = 1.0 - torch.as_tensor(norm, device=flags.device).isfinite().to(flags)
    flags[2] = (supervised == 0).to(flags)
    if signal:
        flags[3] = signal
    if world_size > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    loss, gradient, unlabelled, asked = (int(flag) for flag in flags.tolist())
    if unlabelled:
        return "no label of its samples is supervised", asked
    if not loss and not gradient:
        return None, asked
    odd = [batch for batch in batches if not (loss and bool(batch.values.isfinite().all()))]
    mine: list[Any] = [{}, sorted({sample for batch in odd for sample in batch.culprits()})]
    for batch in odd:
        values = dict(zip(names, batch.values.tolist(), strict=True))
        mine[0] |= {name: value for name, value in values.items() if not _finite(value)}
    found: list[Any] = [mine]
    if world_size > 1:
        found = [None] * world_size
        dist.all_gather_object(found, mine)
    parts = {name: value for values, _ in found for name, value in values.items()}
    samples = sorted({sample for _, ids in found for sample in ids})
    what = "the gradient is not finite"
    if loss:
        # The loss itself says less than its parts do.
        parts = {name: value for name, value in parts.items() if name != "loss" or len(parts) == 1}
        what = ", ".join(f"{name} is {value}" for name, value in parts.items())
    return f"{what}, sample ids {_listed(samples)}", asked


def check_weights(model: nn.Module, what: str, *, world_size: int = 1) -> None:
    """Refuse weights or buffers that are not finite, on every rank alike where ranks share them.

    Raises:
        TrainingDiverged: with the name of the first one.
    """
    name = non_finite_tensor(model)
    found: list[Any] = [name]
    if world_size > 1:
        found = [None] * world_size
        dist.all_gather_object(found, name)
    name = next((entry for entry in found if entry is not None), None)
    if name is not None:
        raise TrainingDiverged(f"{what} must have finite weights, got nan or inf in {name!r}; {CURE}")


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _listed(samples: Sequence[int]) -> str:
    shown = ", ".join(map(str, samples[:_SHOWN_SAMPLES]))
    more = len(samples) - _SHOWN_SAMPLES
    return f"{shown} and {more} more" if more > 0 else shown
