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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import import_error

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One of them, and which operands it takes.

    Attributes:
        load: returns a function of rows ``[R, D]``, weight ``[V, D]`` and targets ``[R]``; may raise ImportError.
        cuda: it needs a CUDA device.
        computes: what sets it apart, for the tables.
        terms: whether it also competes with TCL and HET composed beside it.
        dtypes: of the operands; empty: any.
        multiples: what some of R, V and D must be multiples of.
        capability: the one compute capability that it runs on; None: any.
        fallback_of: name of the peer that is used instead wherever it can be; None: no such peer.
    """

    load: Callable[[], CrossEntropy]
    cuda: bool
    computes: str
    terms: bool = False
    dtypes: tuple[torch.dtype, ...] = ()
    multiples: Mapping[str, int] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    fallback_of: str | None = None

    def refuses(self, rows: Tensor, weight: Tensor) -> str | None:
        """Why it cannot take operands of these shapes and dtypes; None where it can."""
        if self.capability and rows.is_cuda and torch.cuda.get_device_capability(rows.device) != self.capability:
            return f"needs a GPU of compute capability {'.'.join(map(str, self.capability))}"
        if self.dtypes and rows.dtype not in self.dtypes:
            return f"takes {' and '.join(map(_name, self.dtypes))} only, not {_name(rows.dtype)}"
        sizes = {"R": len(rows), "V": weight.shape[0], "D": weight.shape[1]}
        for name, factor in self.multiples.items():
            if sizes[name] % factor:
                return f"takes {name} in multiples of {factor}, not {sizes[name]}"
        if self.fallback_of and PEERS[self.fallback_of].refuses(rows, weight) is None:
            return "only where its chunked path cannot be used"
        return None


def unavailable(peer: Peer, rows: Tensor, weight: Tensor) -> str | None:
    """Why it cannot run on these operands; None where it can be tried."""
    if peer.cuda and rows.device.type != "cuda":
        return "needs a CUDA device"
    return _import_error(peer.load) or peer.refuses(rows, weight)


_import_error = functools.cache(import_error)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pytorch() -> CrossEntropy:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no LinearCrossEntropyOptions (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda rows, weight, target: F.linear_cross_entropy(rows, weight, target, options=options)


def _liger(accumulate: torch.dtype | None) -> CrossEntropy:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)
    return lambda rows, weight, target: loss(weight, rows, target)


def _function(module: str, name: str, **options: object) -> CrossEntropy:
    """A function that takes rows, weight and target in this order."""
    call = getattr(importlib.import_module(module), name)
    return lambda rows, weight, target: call(rows, weight, target, **options)


def _cut(filter_eps: str | None) -> CrossEntropy:
    return _function("cut_cross_entropy", "linear_cross_entropy", filter_eps=filter_eps, impl="cce")


def _quack_unfused() -> CrossEntropy:
    call = importlib.import_module("quack.linear_cross_entropy").linear_cross_entropy_func
    return lambda rows, weight, target: call(rows, weight, None, target, inplace_backward=True)


_LIGER_SM90 = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", "liger_fused_linear_cross_entropy_sm90"
_QUACK = "quack.linear_cross_entropy", "chunked_linear_cross_entropy"
_HALF = torch.bfloat16, torch.float16

PEERS = {
    "torch linear_cross_entropy": Peer(_pytorch, False, "CE", terms=True),
    "liger": Peer(lambda: _liger(None), True, "CE, dW summed in its own dtype (its default)", terms=True),
    "liger fp32 sum": Peer(lambda: _liger(torch.float32), True, "CE"),
    "liger sm90": Peer(
        lambda: _function(*_LIGER_SM90),
        cuda=True,
        computes="CE, CuTe kernels for Hopper, whole logits",
        dtypes=(torch.bfloat16,),
        multiples={"R": 128, "V": 256},
        capability=(9, 0),
    ),
    "cut-cross-entropy": Peer(
        lambda: _cut("high"),
        cuda=True,
        computes="CE, sums in its own dtype, small gradients filtered (its default)",
        terms=True,
        dtypes=_HALF,
    ),
    "cut-cross-entropy exact": Peer(lambda: _cut(None), True, "CE, sums in its own dtype", dtypes=_HALF),
    "quack": Peer(lambda: _function(*_QUACK), True, "CE", terms=True, multiples={"R": 8, "V": 8, "D": 8}),
    "quack unfused": Peer(_quack_unfused, True, "CE, whole logits", fallback_of="quack"),
}
