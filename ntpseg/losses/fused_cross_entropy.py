"""The loss in a training loop of one's own: for a while, the cross-entropy of a head's logits is `ntp_loss`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ntpseg.losses.api import NTPLoss
from ntpseg.losses.deferred_logits import CannotFuse, DeferredLogits
from ntpseg.losses.fused_call import Call
from ntpseg.losses.lm_head import check_head, fuse_head, is_fused_head, linear_of, unfuse_head
from ntpseg.losses.options import LossOptions, NTPOutput
from ntpseg.utils.tensor_checks import check_tensor, shown


@contextlib.contextmanager
def fused_cross_entropy(
    head: nn.Module, options: LossOptions | None = None, **keywords: Any
) -> Iterator[list[NTPOutput]]:
    """Within it ``F.cross_entropy`` of the logits of `head` is `ntp_loss`, and the logits are never there.

    For models that are not transformers' own (LlamaGen, Show-o, Janus and their like): their forward and their loop
    stay as they are.

        with fused_cross_entropy(model.output, negatives=5) as results:
            _, loss = model(cond_idx=classes, idx=codes[:, :-1], targets=codes)

    What may happen to the logits on the way: a change of dtype, slices of rows and positions, a scale, a softcap, and
    being flattened or transposed to ``[B, V, T]``. Everything else raises. Several cross-entropies of parts of the
    logits are as many losses. Labels are taken as they are given, already shifted; the negatives of TCL are those
    before in the same row of ``[B, T]``, as the head saw it.

    ``weight``, ``ignore_index``, ``label_smoothing`` and ``reduction`` ("mean", "sum" and, without negatives, "none")
    of ``F.cross_entropy`` mean what they mean there.

    Args:
        head: the linear layer that makes the logits, ``[V, D]``.
        options: a `LossOptions`, or
        **keywords: its fields one by one.

    Yields:
        A list that gets the `NTPOutput` of each loss (none with ``reduction="none"``).

    Raises:
        ValueError: `head` is no plain linear layer, or fused already; the logits are used in another way; a
            cross-entropy has probabilities as its target, ``reduction="none"`` with negatives, or both class weights
            and label smoothing.
    """
    options = NTPLoss(options, **keywords).options
    check_head(head)
    linear = linear_of(head)
    if is_fused_head(linear):
        # leaving this one would undo the other too, which would then be given logits in silence
        raise CannotFuse(
            "head must be in one fused_cross_entropy at a time and of no fused model, got one that is fused already"
        )
    results: list[NTPOutput] = []

    def cross_entropy(
        logits: DeferredLogits,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        states = logits.hidden
        if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
            raise CannotFuse(f"reduction must be mean, sum or none, got {reduction!r}")
        if logits.dim() != 2 and not logits.transposed:
            raise CannotFuse(
                f"logits must be [N, V] or [B, V, T] in F.cross_entropy, got {list(logits.shape)} with V last: flatten "
                "or transpose them"
            )
        integers = isinstance(target, Tensor) and target.dtype in (torch.int64, torch.int32)
        if not integers or target.numel() != states.shape[:-1].numel():
            raise CannotFuse(f"target must be an int64 tensor for {list(logits.shape)} logits, got {shown(target)}")
        if logits.transposed and target.shape != states.shape[:-1]:
            raise CannotFuse(
                f"target must be {list(states.shape[:-1])} for {list(logits.shape)} logits, got {shown(target)}"
            )
        if weight is not None:
            check_tensor("weight", weight, "float", (logits.classes,))
        if weight is not None and (label_smoothing or options.label_smoothing):
            # PyTorch weighs the smoothed part by the weight of each class, token weights by that of the target
            raise CannotFuse("label_smoothing must be 0 with weight, got both")
        if states.dim() == 2:
            logits = dataclasses.replace(logits, hidden=states.unsqueeze(0))
        labels = target.reshape(logits.hidden.shape[:2])
        settings = dataclasses.replace(
            options,
            shift=False,
            ignore_index=ignore_index,
            logit_scale=logits.logit_scale,
            softcap=logits.softcap,
            label_smoothing=label_smoothing or options.label_smoothing,
        )
        token_weights = None
        if weight is not None:
            token_weights = weight[labels.clamp(0, len(weight) - 1)]
        if reduction == "none":
            if settings.negatives or settings.label_smoothing:
                raise CannotFuse("negatives and label_smoothing must be 0 with reduction='none', got others")
            nll = logits.call_head(labels=labels, options=settings, per_token=True)
            return (nll if token_weights is None else nll * token_weights).reshape(target.shape)
        num_items = 1.0 if reduction == "sum" else None
        fields = logits.call_head(labels=labels, options=settings, token_weights=token_weights, num_items=num_items)
        results.append(NTPOutput(*fields))
        return results[-1].loss

    fuse_head(linear)
    linear.ntp_call = Call(head=head, options=options, cross_entropy=cross_entropy)
    try:
        yield results
    finally:
        linear.ntp_call = None
        unfuse_head(linear)
