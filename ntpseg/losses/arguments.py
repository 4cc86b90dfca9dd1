"""Argument checks of `ntp_loss`: each error names the argument, what it was and what it must be."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntpseg.losses.options import LossOptions, NumItems, checked_range, is_count
from ntpseg.losses.supervision import check_supervision, filled
from ntpseg.losses.value_checks import brief_numbers, check_counts
from ntpseg.utils.checks import brief
from ntpseg.utils.tensor_checks import check_device, check_tensor, readable, shown

if TYPE_CHECKING:
    from ntpseg.memory import HardTokens

_DEFAULTS = LossOptions()


def merged_options(options: LossOptions | None, **keywords: Any) -> LossOptions:
    """Keywords of `ntp_loss` or an options object, not both.

    Raises:
        ValueError: a keyword differs from its default although `options` is given.
    """
    if options is None:
        return LossOptions(**keywords)
    if not isinstance(options, LossOptions):
        raise ValueError(f"options must be a LossOptions, got {type(options).__name__}")
    for name, value in keywords.items():
        default, plain = getattr(_DEFAULTS, name), isinstance(value, int | float | str | tuple | list)
        if value is not default and not (plain and value == default):
            raise ValueError(f"{name} must be set in options when options is given, got {name}={brief(value)} as well")
    return options


def check_transforms(*tensors: Tensor) -> None:
    """Refuses the tensors of ``torch.func``: the loss is an operator whose gradient is no differentiable function.

    Raises:
        ValueError: one is inside ``torch.func.grad``, ``vmap`` or their like.
    """
    if torch.compiler.is_compiling():
        return
    if any(isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise ValueError(
            "hidden and weight must be plain tensors, got those of a torch.func transform (grad, vmap, jvp ...): use "
            "loss.backward() or torch.autograd.grad, or backend='reference' outside of ntp_loss's operator"
        )


def check_operands(hidden: Tensor, weight: Tensor) -> None:
    """What must hold before anything is asked of the two.

    Raises:
        ValueError: one of them is no float tensor of the right number of dimensions.
    """
    check_tensor("hidden", hidden, "float", ("B", "T", "k", "D"), ("B", "T", "D"))
    check_tensor("weight", weight, "float", ("V", "D"), ("k", "V", "D"))


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
    if hidden.dim() == 3:
        hidden = hidden.unsqueeze(2)
    batch, time, heads, width = hidden.shape
    if heads < 1 or width < 1:
        raise ValueError(f"hidden must have k >= 1 heads and D >= 1 features, got {shown(hidden)}")
    if time < 1:
        raise ValueError(f"hidden must have T >= 1 positions, got {shown(hidden)}")
    check_tensor("weight", weight, "float", ("V", width), (heads, "V", width))
    if not vocabulary:
        raise ValueError(f"weight must hold V >= 1 classes, got {shown(weight)}")
    if options.head_weights is not None and len(options.head_weights) != heads:
        raise ValueError(
            f"head_weights must hold {heads} numbers, one per head, got {brief(list(options.head_weights))}"
        )
    if options.vocab_range is not None:
        checked_range(options.vocab_range, vocabulary)
    if bias is not None:
        check_tensor("bias", bias, "float", tuple(weight.shape[:-1]))
    check_tensor("labels", labels, "integer", (batch, time))
    for name, tensor in {"weight": weight, "labels": labels, "bias": bias}.items():
        if tensor is not None:
            check_device(name, tensor, "hidden", hidden.device)
    check_supervision(labels, het, token_weights, batch, time)
    return hidden, weight, labels.to(torch.int64)


def checked_counts(num_items: NumItems | float | Tensor | None, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Counts as float tensors ``[k]`` and 0-dim on the device of `hidden`.

    Raises:
        ValueError: a count is negative or not finite (a tensor on a GPU is looked at later, with the labels), or there
            are not k of them.
    """
    if num_items is None:
        return None, None
    heads = hidden.shape[2]
    if isinstance(num_items, NumItems):
        rows = _count("num_items.rows", num_items.rows, hidden)
        if tuple(rows.shape) != (heads,):
            raise ValueError(
                f"num_items.rows must hold {heads} numbers, one per head, got {brief_numbers(num_items.rows)}"
            )
        het = None if num_items.het is None else _count("num_items.het", num_items.het, hidden)
        if het is not None and het.numel() != 1:
            raise ValueError(f"num_items.het must be one number, got {brief_numbers(num_items.het)}")
    else:
        het = _count("num_items", num_items, hidden)
        if het.numel() != 1 or isinstance(num_items, list | tuple):
            raise ValueError(f"num_items must be a NumItems or one number, got {brief_numbers(num_items)}")
        rows = het.reshape(1).expand(heads)
    return rows.contiguous(), None if het is None else het.reshape(())


def _count(name: str, value: Any, hidden: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool or value.device.type == "meta" != hidden.device.type:
            raise ValueError(f"{name} must be finite and >= 0, got {shown(value)} on {value.device}")
        if readable(value):
            check_counts(name, value)
        # a tensor on a GPU is not looked at: that would synchronise
        return value.detach().to(hidden.device, torch.float64, non_blocking=hidden.device.type != "cpu")
    numbers: Any = [value] if isinstance(value, int | float | Real) else value
    # torch.compile cannot trace math.isfinite
    if not isinstance(numbers, list | tuple) or not all([is_count(number) for number in numbers]):
        raise ValueError(f"{name} must be finite and >= 0, got {brief(value)}")
    if not numbers:
        return hidden.new_empty(0, dtype=torch.float64)
    return filled([float(number) for number in numbers], torch.float64, hidden.device)
