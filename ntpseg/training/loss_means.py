"""Means of the loss and its terms: over the steps since the last log, and over a whole evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ntpseg.utils.files import write_json

_FILE = "loss_means.json"


class LossMeans:
    """Sums of ``[loss, *terms, correct, supervised]`` over the steps that counted, until the next log.

    Args:
        terms: names of the terms.
        world_size: the number of ranks, each of which adds its part.
    """

    def __init__(self, terms: tuple[str, ...], world_size: int = 1) -> None:
        self.names, self.world_size = ("loss", *terms), world_size
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums: Tensor | None = None
        self.steps = 0

    def add(self, row: Tensor) -> None:
        """Add a micro-batch's float64 ``[1 + terms + 2]``."""
        self.sums = row if self.sums is None else self.sums + row

    def totals(self) -> list[float]:
        """The sums over all ranks; all ranks must call it alike."""
        sums = self.sums
        if sums is None:
            return []
        if self.world_size > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
        return sums.tolist()

    def pop(self) -> dict[str, float]:
        """The means since the last call; NaN where no step counted."""
        values, steps = self.totals(), self.steps
        self.reset()
        if not values or not steps:
            return dict.fromkeys(self.names, float("nan"))
        means = {name: value / steps for name, value in zip(self.names, values)}
        means["token_accuracy"] = values[-2] / max(values[-1], 1.0)
        return means

    def save(self, checkpoint: Path, *, write: bool = True) -> None:
        """Keep the sums in a checkpoint, so that the next log of a resumed run is that of an unbroken one.

        Args:
            checkpoint: its folder.
            write: this rank writes; all must call it alike.
        """
        totals = self.totals()
        if write:
            checkpoint.mkdir(parents=True, exist_ok=True)
            write_json(checkpoint / _FILE, {"steps": self.steps, "sums": totals})

    def load(self, checkpoint: Path, device: torch.device | str = "cpu", *, own: bool = True) -> None:
        """Continue from what `save` wrote, if it did.

        Args:
            checkpoint: its folder.
            device: of the rows that will be added.
            own: this rank takes the sums of all; the others start at 0.

        Raises:
            ValueError: sums of another model.
        """
        self.reset()
        path = checkpoint / _FILE
        if not path.is_file():
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
        sums = torch.tensor(saved["sums"], dtype=torch.float64, device=device)
        self.steps = int(saved["steps"])
        if len(sums) not in (0, len(self.names) + 2):
            raise ValueError(f"{path} must hold {len(self.names) + 2} sums as this model has, got {len(sums)}")
        if len(sums):
            self.sums = sums if own else torch.zeros_like(sums)


class EvaluationMeans:
    """The loss of a whole evaluation, whatever its batches: each term over all that it counts.

    Args:
        weights: of the terms in the loss, by name.
        dense: names of the terms that are means over images; the others are means over rows of tokens.
        world_size: the number of ranks, each of which adds its part.
    """

    def __init__(self, weights: dict[str, float], dense: tuple[str, ...], world_size: int = 1) -> None:
        self.weights, self.dense, self.world_size = weights, dense, world_size
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor], counts: dict[str, Tensor], correct: Tensor, supervised: Tensor) -> None:
        """Add a batch's terms with what each was divided by; all 0-dim."""
        row = {name: torch.stack([value.double() * counts[name], counts[name]]) for name, value in terms.items()}
        row["token_accuracy"] = torch.stack([correct.double(), supervised.double()])
        for name, value in row.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def pop(self) -> dict[str, float]:
        """The means, ``loss`` among them; all ranks must call it alike."""
        sums, self.sums = self.sums, {}
        if not sums:
            return {}
        table = torch.stack(list(sums.values()))
        if self.world_size > 1:
            dist.all_reduce(table)
        means = {name: value / (count or 1.0) for name, (value, count) in zip(sums, table.tolist())}
        return {"loss": sum(weight * means[name] for name, weight in self.weights.items() if name in means), **means}
