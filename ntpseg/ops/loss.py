"""Registration of the loss as one custom operator, ``ntpseg::ntp_loss``: schema, fake, autograd.

The implementation is passed in, so that this layer does not import the one above it. The gradients are made in the
forward pass (they are linear in the one incoming number) and only scaled in the backward pass, out of place where the
graph is kept: a second backward over it finds them intact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor


class LossInputs(NamedTuple):
    """The operator's arguments, in the order of its schema.

    Attributes:
        hidden: ``[B, T, k, D]``.
        weight: ``[V, D]`` or ``[k, V, D]``, cut to the vocabulary range, same dtype.
        labels: ``[B, T]`` int64.
        het_position, het_token: ``[B, n]`` int64 or None.
        token_weights: ``[B, T]`` or None.
        num_rows: ``[k]`` or None.
        num_het: 0-dim or None.
        signed_weights: token weights are any numbers and not checked.
        options: `ntpseg.losses.LossOptions.to_text`, with the backend resolved.
        hidden_grad, weight_grad: which gradients to make.
        group: name of the ranks that share the vocabulary, "" for none.
        class_start: class of the slice at which `weight` begins; 0 without a group.
        classes: number of classes in the slice, over all ranks.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    het_position: Tensor | None
    het_token: Tensor | None
    token_weights: Tensor | None
    num_rows: Tensor | None
    num_het: Tensor | None
    signed_weights: bool
    options: str
    hidden_grad: bool
    weight_grad: bool
    group: str
    class_start: int
    classes: int


class LossOutputs(NamedTuple):
    """The operator's results; "work" is float64 for float64 operands, else float32.

    Attributes:
        loss: 0-dim, work.
        parts: ``[5]``, work: `ntpseg.losses.options.LossParts` stacked.
        prediction, nll, margin: ``[B, T, k]`` by the position of the predicted token; int64, work, work.
        d_hidden, d_weight: the gradients of hidden and weight for an incoming one of 1, empty where not wanted; in
            float32 for float16 operands.
    """

    loss: Tensor
    parts: Tensor
    prediction: Tensor
    nll: Tensor
    margin: Tensor
    d_hidden: Tensor
    d_weight: Tensor


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", bool: "bool", int: "SymInt"}


def register_loss(implementation: Callable[[LossInputs], LossOutputs]) -> Any:
    """Registers `implementation` and returns the operator, which takes the fields of `LossInputs` one by one."""
    inputs = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(LossInputs).items())
    outputs = ", ".join("Tensor" for _ in LossOutputs._fields)
    operator = torch.library.custom_op(
        "ntpseg::ntp_loss",
        lambda *args: tuple(implementation(LossInputs(*args))),
        mutates_args=(),
        schema=f"({inputs}) -> ({outputs})",
    )
    operator.register_fake(_fake)
    operator.register_autograd(_backward, setup_context=_setup)
    return operator


def _fake(*args: Any) -> tuple[Tensor, ...]:
    inputs = LossInputs(*args)
    hidden, weight = inputs.hidden, inputs.weight
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    gradient = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    tokens = hidden.shape[:3]
    return tuple(
        LossOutputs(
            loss=hidden.new_empty((), dtype=work),
            parts=hidden.new_empty((5,), dtype=work),
            prediction=hidden.new_empty(tokens, dtype=torch.int64),
            nll=hidden.new_empty(tokens, dtype=work),
            margin=hidden.new_empty(tokens, dtype=work),
            d_hidden=hidden.new_empty(hidden.shape if inputs.hidden_grad else (0,), dtype=gradient),
            d_weight=weight.new_empty(weight.shape if inputs.weight_grad else (0,), dtype=gradient),
        )
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, result = LossInputs(*inputs), LossOutputs(*output)
    ctx.wanted = args.hidden_grad, args.weight_grad
    ctx.dtypes = args.hidden.dtype, args.weight.dtype
    ctx.save_for_backward(result.d_hidden, result.d_weight)
    ctx.mark_non_differentiable(*output[1:])  # all but the loss
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: dict[str, Tensor | None] = dict.fromkeys(LossInputs._fields)
    if grad is not None:
        operands = zip(("hidden", "weight"), ctx.saved_tensors, ctx.dtypes, ctx.wanted)
        gradients |= {name: _scaled(saved, grad, dtype) for name, saved, dtype, wanted in operands if wanted}
        if torch.is_grad_enabled() and type(grad) is Tensor and not torch.compiler.is_compiling():
            gradients |= _once_differentiable({n: g for n, g in gradients.items() if g is not None})
    return tuple(gradients.values())


def _once_differentiable(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients that raise where they are differentiated, as those of PyTorch's decorator of this name do."""
    message = "ntp_loss can be differentiated once only, got a second time: give backend='reference'"
    marked = torch._C._functions.DelayedError(message, len(gradients))(
        *(gradient.detach().requires_grad_() for gradient in gradients.values())
    )
    return dict(zip(gradients, marked if isinstance(marked, tuple) else (marked,)))


def _scaled(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * grad`` in `dtype`, the factor not rounded to the gradient's dtype first.

    Where autograd drops the graph, nobody else sees the saved gradient: a factor of one returns it as it is, and on a
    GPU, where that cannot be seen from the host, it is scaled in place. While tracing, the compiler fuses what is
    below.
    """
    plain = type(grad) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(grad)
    if plain and gradient.dtype == dtype:
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        if gradient.device.type == "cpu":
            # a 0-dim factor on the CPU keeps its precision by itself
            return gradient if not kept and float(grad) == 1.0 else gradient * grad
        scale_ = _scale_kernel()
        if gradient.is_cuda and grad.dtype == torch.float32 and scale_ is not None:
            return scale_(gradient.clone() if kept else gradient, grad)
    return (gradient.to(grad.dtype) * grad).to(dtype)


@functools.cache
def _scale_kernel() -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        from ntpseg.kernels.scale_rows import scale_
    except ImportError:
        return None
    return scale_
