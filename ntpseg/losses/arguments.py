"""Argument checks of `ntp_loss`: each error names the argument, what it was and what it must be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntpseg.losses.options import LossOptions, NumItems
from ntpseg.losses.supervision import check_supervision, filled, shown

if TYPE_CHECKING:
    from ntpseg.memory import HardTokens

_DEFAULTS = LossOptions()
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def merged_options(options: LossOptions | None, **keywords: Any) -> LossOptions:
    """Keywords of `ntp_loss` or an options object, not both.

    Raises:
        ValueError: a keyword differs from its default although `options` is given.
    """
    if options is None:
        weights = keywords["head_weights"]
        if isinstance(weights, Tensor):
            weights = weights.tolist()
        return LossOptions(**{**keywords, "head_weights": None if weights is None else tuple(weights)})
    if not isinstance(options, LossOptions):
        raise ValueError(f"options must be a LossOptions, got {type(options).__name__}")
    for name, value in keywords.items():
        if value is not getattr(_DEFAULTS, name) and value != getattr(_DEFAULTS, name):
            raise ValueError(f"{name} must be set in options when options is given, got {name}={value!r} as well")
    return options


def check_transforms(*tensors: Tensor) -> None:
    """Refuses the tensors of ``torch.func``: the loss is an operator whose gradient is no differentiable function.

    Raises:
        ValueError: one is inside ``torch.func.grad``, ``vmap`` or their like.
    """
    if torch.compiler.is_compiling():
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        raise ValueError(
            "hidden and weight must be plain tensors, got those of a torch.func transform (grad, vmap, jvp ...): use "
            "loss.backward() or torch.autograd.grad, or backend='reference' outside of ntp_loss's operator"
        )


def checked_shapes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions,
    het: HardTokens | None,
    token_weights: Tensor | None,
    vocabulary: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden as ``[B, T, k, D]``, the weight and int64 labels.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if hidden.dim() not in (3, 4) or hidden.dtype not in _FLOATS:
        raise ValueError(f"hidden must be a float [B, T, k, D] or [B, T, D] tensor, got {shown(hidden)}")
    if hidden.dim() == 3:
        hidden = hidden.unsqueeze(2)
    batch, time, heads, width = hidden.shape
    if heads < 1 or width < 1:
        raise ValueError(f"hidden must have k >= 1 heads and D >= 1 features, got {shown(hidden)}")
    if weight.dtype not in _FLOATS or weight.dim() not in (2, 3) or weight.shape[-1] != width or not vocabulary:
        raise ValueError(f"weight must be a float [V, {width}] or [{heads}, V, {width}] tensor, got {shown(weight)}")
    if weight.dim() == 3 and weight.shape[0] != heads:
        raise ValueError(f"weight must hold one matrix for each of the {heads} heads of hidden, got {shown(weight)}")
    if options.head_weights is not None and len(options.head_weights) != heads:
        raise ValueError(f"head_weights must hold {heads} numbers, one per head, got {list(options.head_weights)}")
    if options.vocab_range is not None and options.vocab_range[1] > vocabulary:
        raise ValueError(f"vocab_range must end within the {vocabulary} classes, got {options.vocab_range}")
    if bias is not None and (bias.shape != weight.shape[:-1] or bias.dtype not in _FLOATS):
        raise ValueError(f"bias must be a float {list(weight.shape[:-1])} tensor, got {shown(bias)}")
    for name, tensor in {"weight": weight, "labels": labels, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden ({hidden.device}), got {tensor.device}")
    check_supervision(labels, het, token_weights, batch, time)
    return hidden, weight, labels.to(torch.int64)


def checked_counts(num_items: NumItems | float | Tensor | None, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Counts as float tensors ``[k]`` and 0-dim on the device of `hidden`.

    Raises:
        ValueError: a count is negative or not finite, or there are not k of them.
    """
    if num_items is None:
        return None, None
    heads = hidden.shape[2]
    if isinstance(num_items, NumItems):
        rows = _count("num_items.rows", num_items.rows, hidden)
        if tuple(rows.shape) != (heads,):
            raise ValueError(f"num_items.rows must hold {heads} numbers, one per head, got {num_items.rows!r}")
        het = None if num_items.het is None else _count("num_items.het", num_items.het, hidden)
    else:
        het = _count("num_items", num_items, hidden)
        if het.numel() != 1:
            raise ValueError(f"num_items must be a NumItems or one number, got {num_items!r}")
        rows = het.reshape(1).expand(heads)
    if het is not None:
        if het.numel() != 1:
            raise ValueError(f"num_items.het must be one number, got {num_items!r}")
        het = het.reshape(())
    return rows.contiguous(), het


def _count(name: str, value: Any, hidden: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        # a tensor on a GPU is not looked at: that would synchronise
        return value.detach().to(hidden.device, torch.float64, non_blocking=True)
    numbers = [value] if isinstance(value, int | float) else list(value)
    numbers = [float(number) for number in numbers]
    if not all(0 <= number < math.inf for number in numbers):  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return filled(numbers, torch.float64, hidden.device)
