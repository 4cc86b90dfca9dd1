"""Operands of the loss benchmark: hidden states, an output matrix, labels and hard tokens of one shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ntpseg import HardTokens

BATCH = 8
HARD_TOKENS = 16  # per sample
_RIGHT, _WRONG = 18.0, 12.0  # how far a sure row's logit stands above the rest, in their standard deviations
_ACCURACY = 0.87
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Shape:
    """One point of the grid.

    Attributes:
        rows: R of head 0, a multiple of `BATCH` where they are drawn; head j then has ``BATCH * j`` fewer.
        width, classes: D and V.
        heads, negatives: k and m.
        logits: "random", standard normal; or "peaked", as of a trained model: 87 % of the rows are right, by a margin
            of about 18 standard deviations, and the others are as sure of a wrong token. "trained" are a model's own.
        dtype: of hidden states and matrix.
    """

    rows: int
    width: int
    classes: int
    heads: int = 1
    negatives: int = 5
    logits: str = "random"
    dtype: str = "bfloat16"

    def parameters(self) -> dict[str, int | str]:
        """In the letters of the design."""
        names = {"R": self.rows, "D": self.width, "V": self.classes, "k": self.heads, "m": self.negatives}
        return {**names, "logits": self.logits, "dtype": self.dtype}


@dataclass
class Operands:
    """Tensors of one shape, none of which a provider may write to.

    Attributes:
        shape: their sizes.
        hidden: ``[B, T, k, D]``; weight: ``[V, D]``.
        labels: ``[B, T]`` int64, unshifted; `IGNORE_INDEX` but for one unbroken stretch of each sample.
        het: ``[B, n]`` entries, each at another position than the rest of its sample.
    """

    shape: Shape
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    het: HardTokens

    @staticmethod
    def random(shape: Shape, device: torch.device, seed: int = 0) -> Operands:
        """Draws them in float32 and rounds them once; all positions are supervised.

        Raises:
            ValueError: `shape` has rows or logits that cannot be drawn.
        """
        if shape.rows % BATCH:
            raise ValueError(f"rows must be a multiple of {BATCH}, got {shape.rows}")
        if shape.logits not in ("random", "peaked"):
            raise ValueError(f"logits must be random or peaked, got {shape.logits!r}")
        generator = torch.Generator(device).manual_seed(seed)
        time = shape.rows // BATCH + 1
        size = (BATCH, time, shape.heads, shape.width)
        dtype = getattr(torch, shape.dtype)
        weight = torch.randn(shape.classes, shape.width, device=device, generator=generator) / shape.width**0.5
        hidden = torch.randn(size, device=device, generator=generator)
        labels, wrong = torch.randint(0, shape.classes, (2, BATCH, time), device=device, generator=generator)
        if shape.logits == "peaked":
            missed = torch.rand(BATCH, time, 1, device=device, generator=generator) > _ACCURACY
            for head in range(shape.heads):
                ahead = slice(1 + head, time)
                towards = weight[labels[:, ahead]] * torch.where(missed[:, ahead], _WRONG, _RIGHT)
                towards += torch.where(missed[:, ahead], _RIGHT, 0.0) * weight[wrong[:, ahead]]
                hidden[:, : time - 1 - head, head] += towards
        slots = min(HARD_TOKENS, time - 1)
        order = torch.rand(BATCH, time - 1, device=device, generator=generator).argsort(1)
        position = order[:, :slots] + 1
        token = wrong.gather(1, position)
        return Operands(shape, hidden.to(dtype), weight.to(dtype), labels, HardTokens(position, token))

    def to(self, device: torch.device) -> Operands:
        """The same on another device."""
        het = HardTokens(self.het.position.to(device), self.het.token.to(device))
        return Operands(self.shape, self.hidden.to(device), self.weight.to(device), self.labels.to(device), het)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and matrix."""
        return self.hidden.dtype

    @cached_property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        """Batch, time and head of each supervised row, ``[R]`` each; by head, then sample, then time."""
        parts = []
        for head in range(self.hidden.shape[2]):
            b, t = (self.labels[:, 1 + head :] != IGNORE_INDEX).nonzero(as_tuple=True)
            parts.append(torch.stack([b, t, torch.full_like(b, head)]))
        b, t, j = torch.cat(parts, 1)
        return b, t, j

    @cached_property
    def rows(self) -> Tensor:
        """``[R, D]`` the supervised rows alone: what a plain cross-entropy is given."""
        return self.hidden[self.index].contiguous()

    @cached_property
    def target(self) -> Tensor:
        """``[R]`` their targets."""
        b, t, j = self.index
        return self.labels[b, t + 1 + j]

    @cached_property
    def predecessors(self) -> tuple[Tensor, Tensor]:
        """``[R, m]`` the rows before each row that give its negatives, and whether they exist."""
        steps = torch.arange(1, self.shape.negatives + 1, device=self.target.device)
        row = (torch.arange(len(self.target), device=self.target.device).unsqueeze(1) - steps).clamp_min(0)
        place = self._flat_index
        return row, place[row] == place.unsqueeze(1) - steps

    @cached_property
    def hard(self) -> tuple[Tensor, Tensor]:
        """Row and token of each entry that counts: one whose row is supervised and whose token is not its target."""
        batch, time = self.labels.shape
        sample = torch.arange(batch, device=self.labels.device).unsqueeze(1)
        row_at = torch.full((self.hidden.shape[2] * batch * time,), -1, device=self.labels.device)
        row_at[self._flat_index] = torch.arange(len(self.target), device=self.labels.device)
        row = row_at[(sample * time + self.het.position - 1).flatten()]
        token = self.het.token.flatten()
        keep = (row >= 0) & (token != self.target[row])
        return row[keep], token[keep]

    @property
    def _flat_index(self) -> Tensor:
        b, t, j = self.index
        batch, time = self.labels.shape
        return (j * batch + b) * time + t
