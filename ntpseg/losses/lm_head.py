"""The output head of a fused model: which heads can be fused, and what their forward becomes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntpseg.losses.api import ntp_loss
from ntpseg.losses.deferred_logits import CannotFuse, DeferredLogits
from ntpseg.losses.options import LossOptions, NTPOutput
from ntpseg.losses.token_nll import token_nll
from ntpseg.utils.tensor_checks import shown

OUTPUT_FIELDS = tuple(NTPOutput.__dataclass_fields__)  # made once: torch.compile cannot trace dataclasses.fields


def linear_of(head: Any) -> Any:
    """The module that computes the logits: beneath FSDP's wrapper, or PEFT's copy of the active adapter, if any."""
    while True:
        if hasattr(head, "_fsdp_wrapped_module"):
            head = head._fsdp_wrapped_module
        elif isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
            active = head.active_adapter
            active = active[0] if isinstance(active, list | tuple) else active
            copies = {} if getattr(head, "disable_adapters", False) else dict(head.modules_to_save.items())
            head = copies.get(active, head.original_module)
        else:
            return head


def is_fused_head(module: nn.Module) -> bool:
    """Whether `fuse_head` was applied to this very module."""
    return any(_is_ours(module.__dict__.get(name)) for name in ("forward", "_old_forward"))


def fuse_head(head: Any) -> None:
    """Lets the head defer its logits in a labelled call; in every other call it is the linear layer that it was."""
    head.ntp_call = None
    forward = functools.partial(_forward, head)
    if hasattr(head, "_hf_hook") and hasattr(head, "_old_forward"):
        head._old_forward = forward
    else:
        head.forward = forward


def unfuse_head(head: Any) -> None:
    """Undoes `fuse_head`."""
    if _is_ours(head.__dict__.get("_old_forward")):
        head._old_forward = type(head).forward.__get__(head)
    else:
        del head.forward
    del head.ntp_call


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _forward


def _forward(
    self: Any,
    hidden: Tensor | DeferredLogits,
    labels: Tensor | None = None,
    options: LossOptions | None = None,
    log_sum_exp: bool = False,
    per_token: bool = False,
    deferred: DeferredLogits | None = None,
    **tensors: Any,
) -> Any:
    """Logits, deferred logits, or for deferred logits what they stand for: loss, losses, their logsumexp, logits.

    The loss comes as the fields of `NTPOutput` in a tuple: ZeRO-3 looks for tensors in nothing else.
    """
    call = self.ntp_call
    weight, bias = self.weight, self.bias
    if deferred is not None:
        # pre-hooks have changed the hidden states in the call that deferred the logits, and now once more
        hidden = deferred
    if isinstance(hidden, DeferredLogits):
        if call is not None and call.leaves is not None:
            _, weight, bias = call.leaves
        states = hidden.hidden
        if labels is not None and options is not None:
            if hidden.classes < weight.shape[0]:
                low, high = options.vocab_range or (0, hidden.classes)
                options = dataclasses.replace(options, vocab_range=(low, min(high, hidden.classes)))
            if call is not None and call.inspect is not None:
                call.inspect(hidden, weight, bias, labels, options)
            if per_token:
                return token_nll(states, weight, labels, bias=bias, options=options)
            out = ntp_loss(states, weight, labels, bias=bias, options=options, **tensors)
            return tuple([getattr(out, name) for name in OUTPUT_FIELDS])
        if log_sum_exp:
            return _log_sum_exp(hidden, weight, bias)
        return hidden.finish(F.linear(states, weight, bias))
    if call is None:
        return F.linear(hidden, weight, bias)
    states = hidden
    if call.detach:
        call.leaves = [None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
        states, weight, bias = cast(Any, call.leaves)
    if call.own:
        return F.linear(states, weight, bias)
    return DeferredLogits(
        hidden=states,
        head=call.head,
        classes=weight.shape[0],
        biased=bias is not None,
        dtype=states.dtype,
        ignore_masks=call.ignore_masks,
        cross_entropy=call.cross_entropy,
    )


def _log_sum_exp(logits: DeferredLogits, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[B, T]``: a token's loss is the log-partition function less its logit, whichever token that is."""
    hidden = logits.hidden
    options = LossOptions(
        shift=False, logit_scale=logits.logit_scale, softcap=logits.softcap, vocab_range=(0, logits.classes)
    )
    labels = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    nll = token_nll(hidden, weight, labels, bias=bias, options=options)
    first = F.linear(hidden, weight[:1], None if bias is None else bias[:1])
    return nll + dataclasses.replace(logits, dtype=nll.dtype).finish(first).squeeze(-1)


def check_head(head: Any, model: Any = None) -> None:
    """Refuses a head whose logits are not ``hidden @ weight.T + bias``, or whose weight is not to be had.

    Args:
        head: the output head, with what is wrapped around it.
        model: whose head it is; None: no language model of Hugging Face's.

    Raises:
        ValueError: the head is no linear layer, wrapped by an adapter, quantised or offloaded.
    """
    if not isinstance(head, nn.Module):
        raise CannotFuse(f"the output head must be a plain linear layer, got {shown(head)}")
    head = linear_of(head)
    name = type(head).__name__
    if hasattr(head, "base_layer") or any("lora_" in name for name, _ in head.named_modules()):
        raise CannotFuse(
            f"the output head must be a plain linear layer, got {name}: it is wrapped by an adapter, so its "
            "logits are not hidden @ weight.T. Leave it out of the adapter's target_modules (modules_to_save is fine), "
            "or merge the adapter first"
        )
    if not isinstance(head, nn.Linear) or not isinstance(head.weight, Tensor):
        raise CannotFuse(f"the output head must be a plain linear layer, got {name}")
    if not head.weight.is_floating_point():
        raise CannotFuse(f"the output head must not be quantised, got a weight of {head.weight.dtype}")
    hook = getattr(head, "_hf_hook", None)
    embedded = [] if model is None else list(model.get_input_embeddings().parameters())
    alone = head.weight.device.type == "meta" and any(p.device.type != "meta" for p in embedded)
    if alone or getattr(hook, "offload", False):
        raise CannotFuse(
            "the output head must stay on its device, got one that accelerate offloads between calls: keep it in "
            "device_map on a GPU"
        )
    forward = head.__dict__.get("_old_forward" if hook is not None else "forward")
    own = forward is None or _is_ours(forward) or getattr(forward, "__func__", None) is nn.Linear.forward
    if type(head).forward is not nn.Linear.forward or not own:
        raise CannotFuse(f"the output head's forward must be that of torch.nn.Linear, got another in {name}")
