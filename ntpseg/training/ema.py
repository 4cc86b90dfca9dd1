"""An exponential moving average of the weights, evaluated and saved in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ntpseg.utils.files import atomic_write

_FILE = "ema.safetensors"


class WeightAverage:
    """``average = decay * average + (1 - decay) * weight`` after every step; early steps count for more.

    Args:
        model: whose weights are averaged; buffers are not.
        decay: of a step; step t has ``min(decay, (1 + t) / (10 + t))``, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.weights, _trained(model), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averaged weights."""
        torch._foreach_copy_(_trained(model), self.weights)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block `model` has the averaged weights, after it its own again."""
        own = [p.detach().clone() for p in _trained(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(_trained(model), own)

    def save(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint's folder."""
        tensors = {name: weight.cpu().contiguous() for name, weight in zip(self.names, self.weights)}
        atomic_write(checkpoint / _FILE, save({**tensors, "steps": torch.tensor(self.steps)}))

    def load(self, checkpoint: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            ValueError: the checkpoint has no average, or that of another model.
        """
        path = checkpoint / _FILE
        if not path.is_file():
            raise ValueError(f"checkpoint must hold {_FILE} for optimizer.ema above 0, got none in {checkpoint}")
        tensors = load_file(path)
        self.steps = int(tensors.pop("steps"))
        if set(tensors) != set(self.names):
            odd = sorted(set(tensors) ^ set(self.names))[0]
            raise ValueError(f"{path} must hold the average of this model, got one that differs in {odd!r}")
        for name, weight in zip(self.names, self.weights):
            weight.copy_(tensors[name])


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]
