"""Fused linear cross-entropies of others. Each computes CE alone: ``mean(lse(W h) - (W h)[y])``, and its gradients.

Called as their own documentation has it, read off liger-kernel 0.8.5, cut-cross-entropy 25.1.1 and quack-kernels 0.6.5:

- Liger sums dW over its chunks of rows in the weight's dtype unless it is told another; float32 is what it recommends
  and costs no extra pass. Its CuTe kernels for Hopper are a function of their own.
- cut-cross-entropy adds to dH and dW in the operands' dtype, and by default leaves out blocks whose every softmax is
  below eps / 32 (2^-12 in bfloat16): "exact" does not. It takes no float32.
- QuACK always sums dW in float32. Its chunked path loads by TMA, so R, D and V must be multiples of 8, which
  V = 184,622 is not; there its own module falls back to a product and a cross-entropy kernel, "quack unfused" here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import import_error

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


def _takes_all(rows: Tensor, weight: Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """One of them.

    Attributes:
        load: returns a function of rows ``[R, D]``, weight ``[V, D]`` and targets ``[R]``; may raise ImportError.
        cuda: it needs a CUDA device.
        computes: what sets it apart, for the tables.
        terms: whether it also competes with TCL and HET composed beside it.
        refuses: why it cannot take rows and weight of these shapes and dtypes; None where it can.
    """

    load: Callable[[], CrossEntropy]
    cuda: bool
    computes: str
    terms: bool = False
    refuses: Callable[[Tensor, Tensor], str | None] = _takes_all


def unavailable(peer: Peer, rows: Tensor, weight: Tensor) -> str | None:
    """Why it cannot run on these operands; None where it can be tried."""
    if peer.cuda and rows.device.type != "cuda":
        return "needs a CUDA device"
    return _broken(peer) or peer.refuses(rows, weight)


@functools.cache
def _broken(peer: Peer) -> str | None:
    return import_error(peer.load)


def _pytorch() -> CrossEntropy:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no LinearCrossEntropyOptions (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda rows, weight, target: F.linear_cross_entropy(rows, weight, target, options=options)


def _liger(accumulate: torch.dtype | None) -> CrossEntropy:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)
    return lambda rows, weight, target: loss(weight, rows, target)


def _liger_hopper() -> CrossEntropy:
    module = importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90")
    call = module.liger_fused_linear_cross_entropy_sm90
    return lambda rows, weight, target: call(rows, weight, target)


def _cut(filter_eps: str | None) -> CrossEntropy:
    call = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda rows, weight, target: call(rows, weight, target, filter_eps=filter_eps, impl="cce")


def _quack() -> CrossEntropy:
    call = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda rows, weight, target: call(rows, weight, target)


def _quack_unfused() -> CrossEntropy:
    call = importlib.import_module("quack.linear_cross_entropy").linear_cross_entropy_func
    return lambda rows, weight, target: call(rows, weight, None, target, inplace_backward=True)


def _multiples(rows: Tensor, weight: Tensor, **factors: int) -> str | None:
    sizes = {"R": len(rows), "V": weight.shape[0], "D": weight.shape[1]}
    for name, factor in factors.items():
        if sizes[name] % factor:
            return f"takes {name} in multiples of {factor}; {sizes[name]} is none"
    return None


def _hopper_alone(rows: Tensor, weight: Tensor) -> str | None:
    if rows.is_cuda and torch.cuda.get_device_capability(rows.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if rows.dtype != torch.bfloat16:
        return f"takes bfloat16 only, not {str(rows.dtype).removeprefix('torch.')}"
    return _multiples(rows, weight, R=128, V=256)


def _half_only(rows: Tensor, weight: Tensor) -> str | None:
    if rows.dtype not in (torch.float16, torch.bfloat16):
        return f"takes bfloat16 and float16 only, not {str(rows.dtype).removeprefix('torch.')}"
    return None


def _quack_aligned(rows: Tensor, weight: Tensor) -> str | None:
    return _multiples(rows, weight, R=8, V=8, D=8)


def _quack_takes(rows: Tensor, weight: Tensor) -> str | None:
    return None if _quack_aligned(rows, weight) else "only where its chunked path cannot be used"


PEERS = {
    "torch linear_cross_entropy": Peer(_pytorch, False, "CE", terms=True),
    "liger": Peer(lambda: _liger(None), True, "CE, dW summed in its own dtype (its default)", terms=True),
    "liger fp32 sum": Peer(lambda: _liger(torch.float32), True, "CE"),
    "liger sm90": Peer(_liger_hopper, True, "CE, CuTe kernels for Hopper, whole logits", refuses=_hopper_alone),
    "cut-cross-entropy": Peer(
        lambda: _cut("high"),
        cuda=True,
        computes="CE, sums in its own dtype, small gradients filtered (its default)",
        terms=True,
        refuses=_half_only,
    ),
    "cut-cross-entropy exact": Peer(lambda: _cut(None), True, "CE, sums in its own dtype", refuses=_half_only),
    "quack": Peer(_quack, True, "CE", True, _quack_aligned),
    "quack unfused": Peer(_quack_unfused, True, "CE, whole logits", refuses=_quack_takes),
}
