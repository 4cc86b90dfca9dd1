"""Attention of packed rows, forward and backward: each sequence is causal, and positions start again with each.

What runs is what a decoder with ``data.packing`` calls. The reference is the products of every sequence by itself, so
that a ratio also holds what an implementation computes between two sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from benchmarks.attention_steps import LIMITS, PARTS, products, truth_of
from benchmarks.harness import Comparison, Grid, Provider, Settings, check_errors, relative_error
from ntpseg.models.attention import AttentionUse, implementation, obstacle
from ntpseg.models.attention_choice import attention_function
from ntpseg.models.packing import PackedRows

CANDIDATES = {"ntpseg causal_blocks": "causal_blocks", "sdpa": "sdpa", "eager": "eager"}


@dataclass(frozen=True)
class PackedShape:
    """Sequences of lengths that are log-uniform from `low` to `high`, and rows of at most twice the longest.

    Attributes:
        sequences, low, high: how many, and their tokens.
        heads, width: H and D.
    """

    sequences: int
    low: int
    high: int
    heads: int
    width: int

    def lengths(self) -> list[int]:
        """Tokens of each sequence; the first is the longest."""
        rng = np.random.default_rng(0)
        drawn = np.exp(rng.uniform(np.log(self.low), np.log(self.high), self.sequences - 1))
        return [self.high, *drawn.astype(int).tolist()]


# Sequences of the grid "full" are those of reports: 8 to 600 text tokens, 64 image and 64 mask tokens.
GRIDS: dict[Grid, list[PackedShape]] = {
    "quick": [PackedShape(4, 12, 100, 2, 16)],
    "full": [PackedShape(16, 136, 728, 4, 64)],
}


def comparison(shape: PackedShape, name: str, settings: Settings) -> Comparison:
    """Implementations that serve packed rows on this device, on one batch.

    Args:
        shape: of the batch.
        name: of the dtype.
        settings: of the run.
    """
    device, dtype, lengths = settings.device, getattr(torch, name), shape.lengths()
    most = 2 * shape.high
    plan = PackedRows.plan(lengths, most)
    packed = PackedRows(**{key: value.to(device) for key, value in plan.tensors().items()})
    rows, length = packed.source.shape
    size = (rows, shape.heads, length, shape.width)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, upstream = (torch.randn(size, device=device, generator=generator).to(dtype) for _ in range(4))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    use = AttentionUse(
        device, dtype, batch=len(lengths), heads=shape.heads, length=shape.high, width=shape.width, packing=most
    )
    places = list(_places(plan.bounds.tolist(), length))
    truth: list[tuple[Tensor, ...]] = []

    def load(attention: str) -> Callable[[], tuple[Tensor, ...]]:
        attend = attention_function(implementation(attention, use), use, packed)

        def step() -> tuple[Tensor, ...]:
            out = attend(query, key, value).transpose(1, 2)
            return (out.detach(), *torch.autograd.grad(out, (query, key, value), upstream))

        return step

    def check(step: Callable[[], tuple[Tensor, ...]]) -> dict[str, float]:
        if not truth:
            pieces = [truth_of(*(t[place] for t in (query, key, value, upstream))) for place in places]
            truth.append(tuple(_join(part, query, places) for part in zip(*pieces, strict=True)))
        errors = {part: relative_error(*pair) for part, *pair in zip(PARTS, step(), truth[0], strict=True)}
        return check_errors(errors, dict.fromkeys(PARTS, LIMITS[name]))

    def reference() -> Callable[[], None]:
        steps = [products(*(t[place] for t in (query, key, value, upstream))) for place in places]

        def step() -> None:
            for one in steps:
                one()

        return step

    providers = {"products": Provider(reference, computes="no softmax, no mask, each sequence by itself")}
    for title, attention in CANDIDATES.items():
        computes = "attention within each packed sequence"
        providers[title] = Provider(partial(load, attention), check, obstacle(attention, use), computes)
    squares = sum((place[2].stop - place[2].start) ** 2 for place in places)
    return Comparison(
        providers,
        "products",
        flops=6.0 * shape.heads * squares * shape.width,  # six products, of which causality leaves one half
        # q, k, v, out, its gradient and three gradients, out read again
        bytes=9.0 * query.numel() * query.itemsize,
        tokens=sum(lengths),
        graphs=False,
        dtype=dtype,
    )


def _places(bounds: list[int], length: int) -> Iterator[tuple[slice, slice, slice]]:
    """Where each sequence, and each run of what no sequence fills, lies in ``[R, H, L, D]``."""
    for start, stop in pairwise(bounds):
        row, begin = divmod(start, length)
        yield slice(row, row + 1), slice(None), slice(begin, begin + stop - start)


def _join(pieces: tuple[Tensor, ...], like: Tensor, places: list[tuple[slice, slice, slice]]) -> Tensor:
    """The sequences' pieces at their places, float64."""
    whole = torch.empty(like.shape, dtype=torch.float64, device=like.device)
    for place, piece in zip(places, pieces, strict=True):
        whole[place] = piece
    return whole
