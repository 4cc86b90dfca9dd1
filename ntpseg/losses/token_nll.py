"""The loss of every token with a gradient, for what weighs tokens after it has seen their losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ntpseg.losses.api import autocast_dtype, evaluate, ntp_loss
from ntpseg.losses.arguments import check_operands
from ntpseg.losses.options import LossOptions
from ntpseg.utils.tensor_checks import shown


def token_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, options: LossOptions | None = None
) -> Tensor:
    """Cross-entropy of each token, differentiable: what ``reduction="none"`` is in PyTorch, without stored logits.

    `ntpseg.ntp_loss` also returns ``nll``, but detached, since its gradients are made before anything is done with it.
    Here the backward pass computes the logits once more, with the incoming gradient as weights: 4/3 of the cost of
    `ntp_loss`, and the same memory.

    Args:
        hidden: ``[B, T, D]`` or ``[B, T, 1, D]`` float.
        weight: ``[V, D]``.
        labels: ``[B, T]`` int64, unshifted (``options.shift``).
        bias: ``[V]`` or None.
        options: reads shift, ignore_index, vocab_range, logit_scale, softcap, backend, max_rows, chunk_bytes and
            workspace.

    Returns:
        ``[B, T]`` float32 (float64 for float64), nats, by the position of the predicted token; 0 where unsupervised.

    Raises:
        ValueError: there is more than one head, or an argument is not as `ntp_loss` describes.
    """
    if options is not None and not isinstance(options, LossOptions):
        raise ValueError(f"options must be a LossOptions, got {shown(options)}")
    options = options or LossOptions()
    check_operands(hidden, weight)
    if hidden.dim() == 4 and hidden.shape[2] != 1:
        raise ValueError(f"hidden must have one head for a loss per token, got {hidden.shape[2]}")
    options = dataclasses.replace(
        options, negatives=0, tcl_weight=0.0, het_weight=0.0, z_loss=0.0, label_smoothing=0.0, head_weights=None
    )
    if options.backend == "reference":
        options = options.with_backend("torch")
    # Here, so that the backward pass, which autocast does not reach, computes what the forward pass did.
    hidden = hidden.to(autocast_dtype(hidden))
    return _TokenNLL.apply(hidden, weight, bias, labels, options)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = options
        return ntp_loss(hidden, weight, labels, bias=bias, options=options).nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *operands, labels = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        leaves: list[Any] = [
            None if x is None else x.detach().requires_grad_(need) for x, need in zip(operands, wanted)
        ]
        with torch.enable_grad():
            # weights that sum to anything over a denominator of one: exactly the sum of grad * nll
            loss = evaluate(
                leaves[0],
                leaves[1],
                labels,
                ctx.options,
                bias=leaves[2],
                token_weights=grad.float() if grad.dtype != torch.float64 else grad,
                num_items=1.0,
                signed_weights=True,
            ).loss
        needed = [leaf for leaf, need in zip(leaves, wanted) if leaf is not None and need]
        found = iter(torch.autograd.grad(loss, needed))
        return *(next(found) if leaf is not None and need else None for leaf, need in zip(leaves, wanted)), None, None
