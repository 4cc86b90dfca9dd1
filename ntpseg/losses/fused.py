"""From tensors to the loss and its gradients in one go: compact the rows, run a backend, scatter the results."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor

from ntpseg.losses.backends import gradient_dtype, load_backend
from ntpseg.losses.compaction import Compaction, compact
from ntpseg.losses.options import LossOptions
from ntpseg.losses.supervision import Supervision
from ntpseg.losses.vocab_parallel import Shard
from ntpseg.ops.loss import LossInputs, LossOutputs, register_loss


def fused_loss(inputs: LossInputs) -> LossOutputs:
    """What the custom operator ``ntpseg::ntp_loss`` runs, on every device."""
    hidden, weight, classes = inputs.hidden, inputs.weight, inputs.classes
    options = LossOptions.from_text(inputs.options)
    time = inputs.labels.shape[1]
    if options.negatives > time:  # no row has more before it, and tables have a column for each
        options = dataclasses.replace(options, negatives=time)
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    class_start = options.vocab_range[0] if options.vocab_range else 0
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    supervision = Supervision(
        labels=inputs.labels,
        het_position=inputs.het_position,
        het_token=inputs.het_token,
        token_weights=inputs.token_weights,
        num_rows=inputs.num_rows,
        num_het=inputs.num_het,
        signed_weights=inputs.signed_weights,
    )
    # Kernels go to the current device, whatever the tensors are on. Autocast has had its say on the operands: in here
    # it would round sums that leave float16's range.
    device = torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext()
    with device, torch.autocast(hidden.device.type, enabled=False):
        gradient = inputs.hidden_grad or inputs.weight_grad
        compaction = _compact(
            hidden, weight, supervision, classes, options, sharded=bool(inputs.group), gradient=gradient
        )
        shard = None
        if inputs.group:
            shard = Shard.from_group_name(inputs.group, inputs.class_start, weight.shape[-2], classes)
        result = load_backend(options.backend)(
            compaction.rows,
            weight,
            options,
            hidden_grad=inputs.hidden_grad,
            weight_grad=inputs.weight_grad,
            shard=shard,
        )
        loss, parts = compaction.loss_terms(result, options)
        tokens = compaction.scatter_results(result.prediction, result.nll, result.margin, class_start)
        d_hidden, d_weight = result.d_hidden, result.d_weight
        if d_hidden is not None:
            d_hidden = d_hidden.view(hidden.shape) if result.in_place else compaction.scatter_gradient(d_hidden)
        return LossOutputs(
            loss=loss.to(work),
            parts=parts.to(work),
            prediction=tokens.prediction,
            nll=tokens.nll,
            margin=tokens.margin,
            d_hidden=_no_gradient(hidden) if d_hidden is None else d_hidden,
            d_weight=_no_gradient(weight) if d_weight is None else d_weight,
        )


def _compact(
    hidden: Tensor,
    weight: Tensor,
    supervision: Supervision,
    classes: int,
    options: LossOptions,
    *,
    sharded: bool,
    gradient: bool,
) -> Compaction:
    """By kernels on a GPU, in plain PyTorch elsewhere; see `ntpseg.losses.compaction.compact`."""
    per_head = weight.dim() == 3
    if options.backend == "triton" and hidden.dtype != torch.float64 and supervision.labels.numel():
        from ntpseg.kernels.tl_utils import INTERPRETED
        from ntpseg.losses.compaction_triton import compact_triton

        if hidden.is_cuda or INTERPRETED:
            # a shard has not every target
            targets = None if sharded else weight
            return compact_triton(
                hidden, supervision, classes, options, per_head_weight=per_head, weight=targets, gradient=gradient
            )
    return compact(hidden, supervision, classes, options, per_head_weight=per_head)


def _no_gradient(operand: Tensor) -> Tensor:
    """An operator returns tensors only: an empty one where a gradient is not wanted."""
    return operand.new_empty(0, dtype=gradient_dtype(operand.dtype))


loss_op = register_loss(fused_loss)
