"""The state of a fused model, and of one labelled call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ntpseg.losses.deferred_logits import CannotFuse
from ntpseg.losses.lm_head import check_head, fuse_head, is_fused_head, linear_of
from ntpseg.losses.options import LossOptions, NTPOutput


@dataclass
class Fusion:
    """What a fused model remembers.

    Attributes:
        options: of the loss.
        skip_logits, ignore_masks: see `ntpseg.losses.huggingface.fuse_causal_lm`.
        argument_names: of the model's own forward, in order.
        takes_shift_labels: whether the model's own forward does.
        check_pending: whether the next labelled call compares the fused loss with the model's own first.
        forward_ran: whether the fused forward has run in the current or latest call of the model.
    """

    options: LossOptions
    skip_logits: bool | None
    ignore_masks: bool
    argument_names: list[str]
    takes_shift_labels: bool
    check_pending: bool = False
    forward_ran: bool = False


@dataclass
class Call:
    """One labelled call.

    Attributes:
        head: the model's output head with what is wrapped around it.
        options: of the loss.
        ignore_masks: see `DeferredLogits`.
        shift_labels: labels that are shifted already, or None.
        tensors: further arguments of `ntp_loss`.
        own: compute the model's own loss instead, from logits.
        detach: cut the graph before the head; `leaves` are then what its gradients are asked for.
        leaves: hidden states, weight and bias (or None) of the head.
        inspect: called inside of the head with the deferred logits, weight, bias, labels and options of the loss.
        cross_entropy: see `DeferredLogits`.
        result: of the loss, once it is there.
    """

    head: nn.Module
    options: LossOptions
    ignore_masks: bool = False
    shift_labels: Tensor | None = None
    tensors: dict[str, Any] = field(default_factory=dict)
    own: bool = False
    detach: bool = False
    leaves: list[Tensor | None] | None = None
    inspect: Callable[..., None] | None = None
    cross_entropy: Callable[..., Tensor] | None = None
    result: NTPOutput | None = None


def labelled_forward(model: Any, call: Call, kwargs: dict[str, Any]) -> Any:
    """The forward of the model's class under `call`; the logits in its output are deferred.

    Raises:
        ValueError: the head was replaced since by one that cannot be fused, or the loss did not come from it.
    """
    head = linear_of(call.head)
    if not is_fused_head(head):  # resized, replaced, or another adapter's since
        check_head(call.head, model)
        fuse_head(head)
    for module in (call.head, head):
        if module._backward_hooks or module._backward_pre_hooks:
            raise CannotFuse("the output head must have no backward hooks, got one: there is no gradient of its logits")
    model.ntp_call = head.ntp_call = call
    try:
        out = type(model).forward(model, **kwargs)
    finally:
        model.ntp_call = head.ntp_call = None
    if call.result is None and not call.own:
        raise CannotFuse(
            f"model must compute its loss by self.loss_function, got {type(model).__name__}, which did not call it: "
            "was loss_function replaced, or does an inner model compute the loss? Then fuse that one"
        )
    return out
