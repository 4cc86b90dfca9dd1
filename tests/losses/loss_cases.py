"""Random cases for the loss, drawn from one description, and the measure of agreement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntpseg import HardTokens, NTPOutput, ntp_loss
from ntpseg.losses import LossOptions

PARTS = ("loss", "ntp", "nktp", "tcl", "het")


@dataclass
class Case:
    """Inputs of one call; `run` makes fresh leaves, so that gradients never mix."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    options: LossOptions
    tensors: dict[str, Any] = field(default_factory=dict)

    def loss(self, hidden: Tensor, weight: Tensor, backend: str = "torch") -> NTPOutput:
        """The loss of this case for other hidden states and weights."""
        return ntp_loss(hidden, weight, self.labels, options=self.options.with_backend(backend), **self.tensors)

    def run(self, backend: str = "torch", dtype: torch.dtype | None = None) -> tuple[NTPOutput, Tensor, Tensor]:
        """The output and the gradients of hidden and weight."""
        hidden = self.hidden.detach().to(dtype or self.hidden.dtype).clone().requires_grad_()
        weight = self.weight.detach().to(dtype or self.weight.dtype).clone().requires_grad_()
        out = self.loss(hidden, weight, backend)
        out.loss.backward()
        return out, hidden.grad, weight.grad


def draw(
    batch: int = 2,
    time: int = 9,
    k: int = 3,
    width: int = 8,
    classes: int = 17,
    *,
    per_head: bool = False,
    slots: int = 4,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    unsupervised: float = 0.3,
    seed: int = 0,
    num_items: Any = None,
    weighted: bool = False,
    **options: Any,
) -> Case:
    """A random case. Labels respect ``vocab_range``; hard tokens may be empty, repeated, useless or out of range."""
    make = torch.Generator().manual_seed(seed)
    settings = LossOptions(**options)
    low, high = settings.vocab_range or (0, classes)
    labels = torch.randint(low, high, (batch, time), generator=make)
    labels[torch.rand(batch, time, generator=make) < unsupervised] = settings.ignore_index
    tensors: dict[str, Any] = {"num_items": num_items}
    if slots:
        position = torch.randint(-1, time, (batch, slots), generator=make)
        token = torch.where(position < 0, -1, torch.randint(0, classes, (batch, slots), generator=make))
        tensors["het"] = HardTokens(position, token)
    if weighted:
        tensors["token_weights"] = (torch.rand(batch, time, generator=make) * 2 - 0.5).clamp_min(0)
    shape = (k, classes, width) if per_head else (classes, width)
    return Case(
        hidden=torch.randn(batch, time, k, width, generator=make, dtype=torch.float64).mul(scale).to(dtype),
        weight=torch.randn(shape, generator=make, dtype=torch.float64).to(dtype),
        labels=labels,
        options=settings,
        tensors=tensors,
    )


def error(result: Tensor, truth: Tensor) -> float:
    """Relative error in norm, against a truth that may be zero."""
    result, truth = result.double(), truth.double()
    return float((result - truth).norm() / truth.norm().clamp_min(1e-30))
