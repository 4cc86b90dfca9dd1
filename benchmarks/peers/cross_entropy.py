"""Fused linear cross-entropies of others. Each computes CE alone: ``mean(lse(W h) - (W h)[y])``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One of them.

    Attributes:
        load: returns a function of rows ``[R, D]``, weight ``[V, D]`` and targets ``[R]``; may raise ImportError.
        cuda: it needs a CUDA device.
        does: what sets it apart, for the tables.
    """

    load: Callable[[], CrossEntropy]
    cuda: bool
    does: str


def unavailable(peer: Peer, device: torch.device) -> str | None:
    """Why it cannot run on a device; None where it can be tried."""
    if peer.cuda and device.type != "cuda":
        return "needs a CUDA device"
    try:
        peer.load()
    except Exception as error:  # a broken installation may raise anything on import
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0][:200] if text else ''}"
    return None


def _pytorch() -> CrossEntropy:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no LinearCrossEntropyOptions (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda rows, weight, target: F.linear_cross_entropy(rows, weight, target, options=options)


def _liger(accumulate: torch.dtype | None) -> CrossEntropy:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)
    return lambda rows, weight, target: loss(weight, rows, target)


def _cut(filter_eps: str | None) -> CrossEntropy:
    call = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda rows, weight, target: call(rows, weight, target, filter_eps=filter_eps, impl="cce")


def _quack() -> CrossEntropy:
    return importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy


PEERS = {
    "torch linear_cross_entropy": Peer(_pytorch, False, "CE"),
    "liger": Peer(lambda: _liger(None), True, "CE, dW summed in its own dtype"),
    "liger fp32 sum": Peer(lambda: _liger(torch.float32), True, "CE"),
    "cut-cross-entropy": Peer(lambda: _cut("high"), True, "CE, small gradients filtered"),
    "cut-cross-entropy exact": Peer(lambda: _cut(None), True, "CE"),
    "quack": Peer(_quack, True, "CE"),
}
