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

from ntpseg.training.weight_parts import Part, changed_parts, trained_parts
from ntpseg.utils.files import atomic_write

_FILE = "ema.safetensors"
_STEPS = "steps"


class WeightAverage:
    """``average = decay * average + (1 - decay) * weight`` after every step; early steps count for more.

    Where ranks share the weights (ZeRO-3, FSDP2) each averages its own part, and nothing is gathered. At least float32.

    Args:
        model: whose weights are averaged; buffers are not. It must be where, and divided as, training has it: DeepSpeed
            moves and divides a model when training begins.
        decay: of a step; step t has ``min(decay, (1 + t) / (10 + t))``, so that the random start is soon forgotten.

    Attributes:
        parts: this rank's averages in place of weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.parts = [part._replace(tensor=_wide(part.tensor.clone())) for part in trained_parts(model)]
        self._followed: tuple[nn.Module, list[Part]] | None = None

    @property
    def names(self) -> list[str]:
        """Of the weights."""
        return [part.name for part in self.parts]

    @property
    def weights(self) -> list[Tensor]:
        """The averages."""
        return [part.tensor for part in self.parts]

    @property
    def is_whole(self) -> bool:
        """Whether this rank averages all weights by itself."""
        return all(part.tensor.numel() == part.size for part in self.parts)

    @property
    def step_decay(self) -> float:
        """The decay of the last step."""
        return min(self.decay, (1 + self.steps) / (10 + self.steps))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        # From one step to the next the weights stay in their place. Not from the first forward pass on, which gives
        # FSDP2's uneven shards another one, nor where others have been put into it.
        if self._followed is None or self._followed[0] is not model:
            self._followed = model, trained_parts(model)
        torch._foreach_lerp_(self.weights, [_wide(part.tensor) for part in self._followed[1]], 1 - self.step_decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averaged weights; all ranks must call it alike."""
        self._give(model, self.weights)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block `model` has the averaged weights, after it its own again; all ranks must call it alike."""
        own = [part.tensor.clone() for part in trained_parts(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            self._give(model, own)

    @torch.no_grad()
    def _give(self, model: nn.Module, weights: list[Tensor]) -> None:
        self._followed = None
        with changed_parts(model) as parts:
            torch._foreach_copy_([part.tensor for part in parts], weights)

    def save(self, checkpoint: Path, rank: int = 0) -> None:
        """Write the average into a checkpoint's folder: ``ema.safetensors``, or of a part ``ema_RANK.safetensors``.

        Args:
            checkpoint: the folder.
            rank: of this process; where it averages all weights, rank 0 alone should call this.
        """
        whole = self.is_whole
        # Views of one buffer cannot be saved, and parts of several weights may be such.
        tensors = {part.name: part.tensor.cpu().clone().contiguous() for part in self.parts}
        metadata = None if whole else {"starts": json.dumps({part.name: part.start for part in self.parts})}
        path = checkpoint / (_FILE if whole else f"ema_{rank}.safetensors")
        atomic_write(path, save({**tensors, _STEPS: torch.tensor(self.steps)}, metadata))

    def load(self, checkpoint: Path) -> None:
        """Continue from what `save` wrote, on however many ranks.

        Raises:
            ValueError: the checkpoint has no average, or that of another model.
        """
        paths = average_files(checkpoint)
        own = {part.name: part for part in self.parts}
        filled = dict.fromkeys(own, 0)
        for path in paths:
            with safe_open(path, "pt") as file:
                names = set(file.keys()) - {_STEPS}
                if names != set(own):
                    odd = sorted(names ^ set(own))[0]
                    raise ValueError(f"{path} must hold the average of this model, got one that differs in {odd!r}")
                self.steps = int(file.get_tensor(_STEPS))
                starts = json.loads((file.metadata() or {}).get("starts", "{}"))
                for name, part in own.items():
                    filled[name] += _fill(part, file, starts.get(name, 0))
        for name, part in own.items():
            if filled[name] != part.tensor.numel():
                raise ValueError(
                    f"{checkpoint} must hold the average of this model, got {filled[name]} of {part.tensor.numel()} "
                    f"entries of {name!r}"
                )


def average_files(checkpoint: Path) -> list[Path]:
    """The files that `WeightAverage.save` wrote, by rank.

    Raises:
        ValueError: there are none.
    """
    if (checkpoint / _FILE).is_file():
        return [checkpoint / _FILE]
    found = ((path, re.fullmatch(r"ema_(\d+)\.safetensors", path.name)) for path in checkpoint.glob("ema_*"))
    paths = [path for _, path in sorted((int(match[1]), path) for path, match in found if match)]
    if not paths:
        raise ValueError(f"checkpoint must hold {_FILE} for optimizer.ema above 0, got none in {checkpoint}")
    return paths


def _fill(part: Part, file: Any, begin: int) -> int:
    """Copy into a part the entries that `file` has of it from `begin` on; how many."""
    shape = torch.Size(file.get_slice(part.name).get_shape())
    low, high = max(part.start, begin), min(part.start + part.tensor.numel(), begin + shape.numel())
    if low >= high:
        return 0
    found = file.get_tensor(part.name).flatten()[low - begin : high - begin]
    part.tensor.view(-1)[low - part.start : high - part.start].copy_(found)
    return high - low


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
