"""What every comparison of attention measures against: the plain products, and the result in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import attention as peers

# Largest relative errors by dtype, and the parts of a step's result that they hold for.
LIMITS = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
PARTS = ("out", "d_query", "d_key", "d_value")


def products(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> Callable[[], Any]:
    """The six batched products of attention, forward and backward, of ``[B, H, T, D]`` each."""
    query, key, value = (x.detach() for x in (query, key, value))
    scores = query @ key.transpose(-1, -2)
    out, d_scores = torch.empty_like(query), torch.empty_like(scores)

    def step() -> None:
        torch.matmul(query, key.transpose(-1, -2), out=scores)
        torch.matmul(scores, value, out=out)
        torch.matmul(scores.transpose(-1, -2), upstream, out=out)
        torch.matmul(upstream, value.transpose(-1, -2), out=d_scores)
        torch.matmul(d_scores, key, out=out)
        torch.matmul(d_scores.transpose(-1, -2), query, out=out)

    return step


def truth_of(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients ``[B, H, T, D]`` of causal attention in float64.

    One sample and head at a time: long sequences' scores are large.
    """
    parts = []
    flat = [x.detach().flatten(0, 1) for x in (query, key, value, upstream)]
    for *inputs, d_out in zip(*flat, strict=True):
        leaves = [x.double().requires_grad_() for x in inputs]
        out = peers.eager(*leaves)
        parts.append((out.detach(), *torch.autograd.grad(out, leaves, d_out.double())))
    return tuple(torch.stack(part).view(query.shape) for part in zip(*parts, strict=True))
