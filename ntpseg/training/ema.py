"""An exponential moving average of the weights, evaluated and saved in place of the last ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ntpseg.training.weight_parts import changed_parts, trained_parts
from ntpseg.utils.files import atomic_write

_FILE = "ema.safetensors"
_STEPS = "steps"


class WeightAverage:
    """``average = decay * average + (1 - decay) * weight`` after every step; early steps count for more.

    Where ranks share the weights (ZeRO-3, FSDP2) each averages its own part, and nothing is gathered. At least float32.

    Args:
        model: whose weights are averaged; buffers are not.
        decay: of a step; step t has ``min(decay, (1 + t) / (10 + t))``, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        parts = trained_parts(model)
        self.names = [part.name for part in parts]
        self.ranges = [(part.start, part.size) for part in parts]
        self.weights = [_wide(part.tensor.detach().clone()) for part in parts]

    @property
    def is_whole(self) -> bool:
        """Whether this rank averages all weights by itself."""
        return all(weight.numel() == size for weight, (_, size) in zip(self.weights, self.ranges))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.weights, [_wide(part.tensor) for part in trained_parts(model)], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averaged weights; all ranks must call it alike."""
        with changed_parts(model) as parts:
            torch._foreach_copy_([part.tensor for part in parts], self.weights)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block `model` has the averaged weights, after it its own again; all ranks must call it alike."""
        own = [part.tensor.detach().clone() for part in trained_parts(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad(), changed_parts(model) as parts:
                torch._foreach_copy_([part.tensor for part in parts], own)

    def save(self, checkpoint: Path, rank: int = 0) -> None:
        """Write the average into a checkpoint's folder: ``ema.safetensors``, or of a part ``ema_RANK.safetensors``.

        Args:
            checkpoint: the folder.
            rank: of this process; where it averages all weights, rank 0 alone should call this.
        """
        whole = self.is_whole
        # Views of one buffer cannot be saved, and parts of several weights may be such.
        tensors = {name: weight.cpu().clone().contiguous() for name, weight in zip(self.names, self.weights)}
        starts = {name: start for name, (start, _) in zip(self.names, self.ranges)}
        metadata = None if whole else {"starts": json.dumps(starts)}
        path = checkpoint / (_FILE if whole else f"ema_{rank}.safetensors")
        atomic_write(path, save({**tensors, _STEPS: torch.tensor(self.steps)}, metadata))

    def load(self, checkpoint: Path) -> None:
        """Continue from what `save` wrote, on however many ranks.

        Raises:
            ValueError: the checkpoint has no average, or that of another model.
        """
        paths = [checkpoint / _FILE] if (checkpoint / _FILE).is_file() else _parts_of(checkpoint)
        if not paths:
            raise ValueError(f"checkpoint must hold {_FILE} for optimizer.ema above 0, got none in {checkpoint}")
        filled = dict.fromkeys(self.names, 0)
        for path in paths:
            with safe_open(path, "pt") as file:
                names = set(file.keys()) - {_STEPS}
                if names != set(self.names):
                    odd = sorted(names ^ set(self.names))[0]
                    raise ValueError(f"{path} must hold the average of this model, got one that differs in {odd!r}")
                self.steps = int(file.get_tensor(_STEPS))
                starts = json.loads((file.metadata() or {}).get("starts", "{}"))
                for name, weight, (start, _) in zip(self.names, self.weights, self.ranges):
                    filled[name] += _fill(weight, start, file, name, starts.get(name, 0))
        for name, weight in zip(self.names, self.weights):
            if filled[name] != weight.numel():
                raise ValueError(
                    f"{checkpoint} must hold the average of this model, got {filled[name]} of {weight.numel()} entries "
                    f"of {name!r}"
                )


def _parts_of(checkpoint: Path) -> list[Path]:
    found = ((path, re.fullmatch(r"ema_(\d+)\.safetensors", path.name)) for path in checkpoint.glob("ema_*"))
    return [path for _, path in sorted((int(match[1]), path) for path, match in found if match)]


def _fill(weight: Tensor, start: int, file: Any, name: str, begin: int) -> int:
    """Copy into `weight`, which begins at `start`, the entries that `file` has of it from `begin` on; how many."""
    shape = torch.Size(file.get_slice(name).get_shape())
    low, high = max(start, begin), min(start + weight.numel(), begin + shape.numel())
    if low >= high:
        return 0
    part = file.get_tensor(name).flatten()[low - begin : high - begin]
    weight.view(-1)[low - start : high - start].copy_(part)
    return high - low


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
