"""Registration of the loss as one custom operator, ``ntpseg::ntp_loss``: schema, fake, autograd.

The implementation is handed in, so that this layer does not import the one above it. The gradients are made in the
forward pass (they are linear in the one incoming number) and only scaled in the backward pass, out of place where the
graph is kept: a second backward over it finds them intact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Implementation = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]


def register_loss(implementation: Implementation) -> Any:
    """Registers `implementation` (see `ntpseg.losses.fused.fused_loss`) and returns the operator."""
    operator = torch.library.custom_op("ntpseg::ntp_loss", implementation, mutates_args=())
    operator.register_fake(_fake)
    operator.register_autograd(_backward, setup_context=_setup)
    return operator


def _fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    het_position: Tensor | None,
    het_token: Tensor | None,
    token_weights: Tensor | None,
    num_rows: Tensor | None,
    num_het: Tensor | None,
    settings: str,
    hidden_grad: bool,
    weight_grad: bool,
    group: str,
    first: int,
    classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    tokens = hidden.shape[:3]
    return (
        hidden.new_empty((), dtype=work),
        hidden.new_empty((5,), dtype=work),
        hidden.new_empty(tokens, dtype=torch.int64),
        hidden.new_empty(tokens, dtype=work),
        hidden.new_empty(tokens, dtype=work),
        hidden.new_empty(hidden.shape if hidden_grad else (0,), dtype=kept),
        weight.new_empty(weight.shape if weight_grad else (0,), dtype=kept),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight = inputs[:2]
    ctx.hidden_grad, ctx.weight_grad = inputs[9:11]
    ctx.dtypes = (hidden.dtype, weight.dtype)
    ctx.save_for_backward(output[5], output[6])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 12
    if grad is None:
        return None, None, *nothing
    d_hidden, d_weight = ctx.saved_tensors
    return (
        _scaled(d_hidden, grad, ctx.dtypes[0]) if ctx.hidden_grad else None,
        _scaled(d_weight, grad, ctx.dtypes[1]) if ctx.weight_grad else None,
        *nothing,
    )


def _scaled(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * grad`` in `dtype`, the factor not rounded to the gradient's dtype first.

    Where autograd drops the graph, nobody else sees the saved gradient: a factor of one hands it over as it is, and on
    a GPU, where that cannot be seen from the host, it is scaled in place. While tracing, the compiler fuses what is
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
