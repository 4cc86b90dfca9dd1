"""From tensors to the loss and its gradients in one go: plan the rows, run a backend, put the results in place."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ntpseg.losses.backends import gradient_dtype, load_backend
from ntpseg.losses.compaction import RowPlan, plan_rows
from ntpseg.losses.options import LossOptions
from ntpseg.losses.vocab_parallel import Shard
from ntpseg.ops.loss import register_loss


def fused_loss(
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
    """What the custom operator ``ntpseg::ntp_loss`` runs, on every device.

    Args:
        hidden: ``[B, T, k, D]``.
        weight: ``[V, D]`` or ``[k, V, D]``, cut to the vocabulary range, same dtype.
        labels: ``[B, T]`` int64.
        het_position, het_token: ``[B, n]`` int64 or None.
        token_weights: ``[B, T]`` or None.
        num_rows: ``[k]`` or None.
        num_het: 0-dim or None.
        settings: `LossOptions.to_text`, with the backend resolved.
        hidden_grad, weight_grad: which gradients to make.
        group: name of the ranks that share the vocabulary, "" for none.
        first: class of the slice at which `weight` begins; 0 without a group.
        classes: number of classes in the slice, over all ranks.

    Returns:
        loss (0-dim), parts ``[5]`` (ntp, nktp, tcl, het, z), prediction, nll and margin ``[B, T, k]`` by the position
        of the predicted token, and the gradients of hidden and weight (empty when not wanted).
    """
    options = LossOptions.from_text(settings)
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    low = options.vocab_range[0] if options.vocab_range else 0
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    # kernels go to the current device, whatever the tensors are on
    with torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext():
        plan = plan_batch(
            hidden,
            labels,
            classes,
            options,
            per_head_weight=weight.dim() == 3,
            het_position=het_position,
            het_token=het_token,
            token_weights=token_weights,
            num_rows=num_rows,
            num_het=num_het,
        )
        rows = plan.rows
        shard = {"shard": Shard.from_group_name(group, first, weight.shape[-2], classes)} if group else {}
        found = load_backend(options.backend)(
            rows, weight, options, hidden_grad=hidden_grad, weight_grad=weight_grad, **shard
        )

        tcl = (rows.share * found.tcl).sum()
        het = found.het.sum() * rows.het_share
        nktp = (rows.share * found.nll).sum()
        z = (rows.share * found.lse.square()).sum()
        parts = torch.stack([(plan.ntp_share * found.nll).sum(), nktp, tcl, het, z])
        loss = nktp + options.tcl_weight * tcl + options.het_weight * het + options.z_loss * z

        d_hidden = hidden.new_empty(0, dtype=gradient_dtype(hidden.dtype))
        if found.d_hidden is not None:
            d_hidden = plan.gradient(found.d_hidden)
        d_weight = weight.new_empty(0, dtype=gradient_dtype(weight.dtype)) if found.d_weight is None else found.d_weight
        return (
            loss.to(work),
            parts.to(work),
            *plan.results(found.prediction, found.nll, found.margin, low),
            d_hidden,
            d_weight,
        )


def plan_batch(hidden: Tensor, labels: Tensor, classes: int, options: LossOptions, **keywords: Any) -> Any:
    """See `ntpseg.losses.compaction.plan_rows` for the arguments and errors.

    Returns:
        A `RowPlan`, or a `ntpseg.losses.compaction_triton.KernelPlan`, which offers the same.
    """
    if options.backend == "triton" and hidden.dtype != torch.float64 and labels.numel():
        from ntpseg.kernels.tl_utils import INTERPRETED
        from ntpseg.losses.compaction_triton import plan_by_kernels

        if hidden.is_cuda or INTERPRETED:
            return plan_by_kernels(hidden, labels, classes, options, **keywords)
    rows, ntp_share = plan_rows(hidden, labels, classes, options, **keywords)
    batch, time, heads, _ = hidden.shape
    return RowPlan(rows, ntp_share, (batch, time, heads), int(options.shift))


loss_op = register_loss(fused_loss)
