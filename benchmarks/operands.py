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


@dataclass(frozen=True)
class Shape:
    """One point of the grid.

    Attributes:
        rows: R of head 0, a multiple of `BATCH`; head j has ``BATCH * j`` fewer.
        width, classes: D and V.
        heads, negatives: k and m.
        logits: "random", standard normal; or "peaked", as of a trained model: 87 % of the rows are right, by a margin
            of about 18 standard deviations, and the others are as sure of a wrong token.
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
    """Tensors of one shape, none of which a contestant may write to.

    Attributes:
        hidden: ``[B, T, k, D]``; weight: ``[V, D]``; labels: ``[B, T]``, all supervised.
        het: ``[B, n]`` entries, each at another position than the rest of its sample.
    """

    shape: Shape
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    het: HardTokens

    @staticmethod
    def make(shape: Shape, device: torch.device, seed: int = 0) -> Operands:
        """Draws them in float32 and rounds them once."""
        if shape.rows % BATCH:
            raise ValueError(f"rows is {shape.rows}; it must be a multiple of {BATCH}")
        draw = torch.Generator(device).manual_seed(seed)
        time = shape.rows // BATCH + 1
        size = (BATCH, time, shape.heads, shape.width)
        dtype = getattr(torch, shape.dtype)
        weight = torch.randn(shape.classes, shape.width, device=device, generator=draw) / shape.width**0.5
        hidden = torch.randn(size, device=device, generator=draw)
        labels, wrong = torch.randint(0, shape.classes, (2, BATCH, time), device=device, generator=draw)
        if shape.logits == "peaked":
            missed = torch.rand(BATCH, time, 1, device=device, generator=draw) > _ACCURACY
            for head in range(shape.heads):
                ahead = slice(1 + head, time)
                towards = weight[labels[:, ahead]] * torch.where(missed[:, ahead], _WRONG, _RIGHT)
                towards += torch.where(missed[:, ahead], _RIGHT, 0.0) * weight[wrong[:, ahead]]
                hidden[:, : time - 1 - head, head] += towards
        elif shape.logits != "random":
            raise ValueError(f"logits is {shape.logits!r}; it must be random or peaked")
        slots = min(HARD_TOKENS, time - 1)
        order = torch.rand(BATCH, time - 1, device=device, generator=draw).argsort(1)
        position = order[:, :slots] + 1
        token = wrong.gather(1, position)
        return Operands(shape, hidden.to(dtype), weight.to(dtype), labels, HardTokens(position, token))

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and matrix."""
        return self.hidden.dtype

    @cached_property
    def place(self) -> tuple[Tensor, Tensor, Tensor]:
        """Batch, time and head of each supervised row, ``[R]`` each; by head, then sample, then time."""
        batch, time, heads, _ = self.hidden.shape
        parts = []
        for head in range(heads):
            b, t = torch.meshgrid(torch.arange(batch), torch.arange(time - 1 - head), indexing="ij")
            parts.append(torch.stack([b.flatten(), t.flatten(), torch.full_like(b.flatten(), head)]))
        b, t, j = torch.cat(parts, 1).to(self.hidden.device)
        return b, t, j

    @cached_property
    def rows(self) -> Tensor:
        """``[R, D]`` the supervised rows alone: what a plain cross-entropy is given."""
        return self.hidden[self.place].contiguous()

    @cached_property
    def target(self) -> Tensor:
        """``[R]`` their targets."""
        b, t, j = self.place
        return self.labels[b, t + 1 + j]

    @cached_property
    def before(self) -> tuple[Tensor, Tensor]:
        """``[R, m]`` the rows before each row that give its negatives, and whether they exist."""
        row = torch.arange(len(self.target), device=self.target.device).unsqueeze(1)
        back = torch.arange(1, self.shape.negatives + 1, device=self.target.device)
        return (row - back).clamp_min(0), back <= self.place[1].unsqueeze(1)

    @cached_property
    def hard(self) -> tuple[Tensor, Tensor]:
        """Row and token of each entry that counts."""
        position, token = self.het.position, self.het.token
        time = self.hidden.shape[1]
        sample = torch.arange(len(position), device=position.device).unsqueeze(1)
        row = (sample * (time - 1) + position - 1).flatten()
        keep = token.flatten() != self.target[row]
        return row[keep], token.flatten()[keep]
