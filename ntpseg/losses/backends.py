"""Backend interface: what a backend is given, what it computes and what it returns.

A backend is one function

    rows_loss(rows, weight, options, *, hidden_grad, weight_grad, shard=None) -> RowsResult

What it is given
    `rows`: the compacted supervised rows, see `ntpseg.losses.compaction.Rows` (hidden, target, row_weight,
        num_negatives, hard_tokens, ...). R may be 0.
    `weight`: ``[V, D]`` (one segment) or ``[k, V, D]`` (k segments), already cut to ``options.vocab_range``, the same
        dtype as ``rows.hidden``. Its last dimension is contiguous; do not assume the rest. Never write to it.
    `options`: reads negatives, tcl_weight, het_weight, temperature, z_loss, softcap, gradient_filter, chunk_bytes and
        workspace.
        The rest (heads, shift, ignore_index, vocab_range, logit_scale, counts, token weights) is already worked into
        `rows`. Only the torch backend knows a softcap, and `choose_backend` gives it to no other.
    `hidden_grad`, `weight_grad`: which gradients are wanted. A frozen weight or a call without autograd pays nothing.
    `shard`: the classes that `weight` holds where ranks share the vocabulary (`ntpseg.losses.vocab_parallel`); then
        `d_hidden` is summed over them. None: all.

What it computes, for row r with g = row_weight[r], y = target[r], z = weight @ hidden[r]
    z becomes softcap * tanh(z / softcap) where that is on
    nll = lse - z[y];  margin = max z - z[y];  prediction = argmax z, lowest id on ties
    negatives: prediction[r - i] for 1 <= i <= num_negatives[r], where it differs from y
    tcl = log(1 + sum_negatives exp((z[neg] - z[y]) / tau))
    het = sum over e in hard_tokens[r], e >= 0, of log(1 + exp((z[e] - z[y]) / tau))
    and the gradients with respect to hidden and weight of
    sum_r g * (nll + tcl_weight * tcl + z_loss * lse^2) + het_weight * entry_weight * het

What it returns: `RowsResult`. The caller forms the scalar parts from it, scatters the gradients and multiplies them
with the incoming one. Rows never overlap, so the scatter is a plain index copy; a backend that is given
`rows.inverse_index` may write the gradient of hidden to its places itself and say so (`RowsResult.in_place`).

A new backend adds one line to `_BACKENDS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ntpseg.losses.compaction import Rows
from ntpseg.losses.options import LossOptions
from ntpseg.losses.vocab_parallel import Shard


@dataclass(frozen=True)
class RowsResult:
    """Per-row results and the gradients; "work" is float64 for float64 operands, else float32.

    Attributes:
        prediction: ``[R]`` int64, relative to the slice of the vocabulary; -1 on padding rows.
        nll, margin, tcl, het, lse: ``[R]`` work, 0 on padding rows.
        d_hidden: ``[R, D]`` or None when not wanted. The dtype of hidden, but work for float16 (a loss scale is
            multiplied in later, and must find what float16 would have flushed to zero).
        d_weight: the shape of weight, or None; the same rule for its dtype. Accumulated in work.
        in_place: ``d_hidden`` is ``[B * T * k, D]``, the rows in the places of `rows.gather_index` and zeros elsewhere.
    """

    prediction: Tensor
    nll: Tensor
    margin: Tensor
    tcl: Tensor
    het: Tensor
    lse: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    in_place: bool = False


class RowsLoss(Protocol):
    """A backend; see the module's page."""

    def __call__(
        self,
        rows: Rows,
        weight: Tensor,
        options: LossOptions,
        *,
        hidden_grad: bool,
        weight_grad: bool,
        shard: Shard | None = None,
    ) -> RowsResult: ...


_BACKENDS = {
    "torch": ("ntpseg.losses.torch_backend", "rows_loss"),
    "triton": ("ntpseg.losses.triton_backend", "rows_loss"),
}


def gradient_dtype(operand: torch.dtype) -> torch.dtype:
    """The dtype in which a backend returns gradients."""
    return torch.float32 if operand == torch.float16 else operand


def load_backend(name: str) -> RowsLoss:
    """The function of a backend.

    Raises:
        ValueError: the backend cannot be used on this machine; the message says why.
    """
    module, function = _BACKENDS[name]
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ValueError(f"backend must be usable on this machine, got {name!r}: {error}") from error


@torch.compiler.assume_constant_result
def _load_error(name: str) -> str:
    """Why a backend cannot be loaded, "" if it can. A constant to torch.compile, which cannot trace an import."""
    try:
        load_backend(name)
    except ValueError as error:
        return str(error)
    return ""


def choose_backend(name: str, device: torch.device, softcap: float | None = None) -> str:
    """Resolves "auto": triton on CUDA where it imports and can do what is asked for, else torch.

    Raises:
        ValueError: "triton" was asked for and cannot be imported, or with a softcap.
    """
    if softcap is not None:
        if name == "triton":
            raise ValueError(f"backend must be auto, torch or reference with softcap, got {name!r}")
        return "torch" if name == "auto" else name
    if name == "triton":
        error = _load_error(name)
        if error:
            raise ValueError(error)
    if name != "auto":
        return name
    return "triton" if device.type == "cuda" and not _load_error("triton") else "torch"
