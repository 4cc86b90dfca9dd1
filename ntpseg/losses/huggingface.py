"""One call that makes a Hugging Face causal language model train without ever holding its logits.

    model = fuse_causal_lm(AutoModelForCausalLM.from_pretrained(...), negatives=5)
    Trainer(model, args, train_dataset=...).train()

With labels, ``forward`` runs the decoder and passes its hidden states to the output head, which computes the loss
inside its own ``__call__`` (so ZeRO-3 and FSDP find its weight gathered) and returns no logits. Without labels nothing
changes.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

from ntpseg.losses.api import NTPLoss
from ntpseg.losses.options import LossOptions, NTPOutput

# Settings under which a model's logits are not plainly ``hidden @ weight.T``, and the value that switches each off.
_LOGIT_CHANGES = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0, "output_multiplier": 1.0}


def fuse_causal_lm(model: nn.Module, options: LossOptions | None = None, **keywords: Any) -> nn.Module:
    """Replaces the loss of a Hugging Face causal language model by `ntp_loss`, in place.

    Works for models whose ``forward`` is decoder, output head, loss: Llama, Qwen2/3, Emu3, Chameleon and their like.
    Trainer's ``num_items_in_batch`` becomes ``num_items``. A batch may also carry ``het_position`` and ``het_token``
    (both ``[B, n]`` int64, see `HardTokens`) and ``token_weights`` (``[B, T]``). The output has ``loss`` and no logits.
    Chameleon's own forward hides image tokens from the softmax in training too; here they take part, as training on
    image tokens needs.

    Args:
        model: a ``PreTrainedModel`` with an output head, or a PEFT model around one.
        options: a `LossOptions`, or
        **keywords: its fields one by one. TCL and HET are on by default; ``negatives=0`` leaves cross-entropy.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no output head; the head is wrapped (LoRA), quantised, offloaded or has a bias; or
            the model scales or caps its logits.
    """
    loss = NTPLoss(options, **keywords)
    wrapped: Any = model
    inner: Any = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    head: Any = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or not isinstance(getattr(inner, "model", None), nn.Module):
        raise ValueError(f"model must be a causal language model with .model and an output head, got {_name(inner)}")
    _check_head(head)
    for config in (inner.config, inner.config.get_text_config()):
        for name, off in _LOGIT_CHANGES.items():
            value = getattr(config, name, off)
            if value is not None and value != off:
                raise ValueError(f"model must not change its logits, got {_name(inner)} with config.{name} = {value!r}")

    head.forward = types.MethodType(_head_forward, head)
    head.ntp_loss = loss
    inner.forward = types.MethodType(_causal_lm_forward(type(inner)), inner)
    return model


def _causal_lm_forward(kind: Any) -> Any:
    """The forward of the class `kind` with our loss in it; refers to no instance, so that a copied model is whole."""

    @functools.wraps(kind.forward)  # Trainer reads the signature to see which columns and keywords the model takes
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return kind.forward(self, *args, **kwargs)
        return _labelled_forward(self, labels, *args, **kwargs)

    return forward


def _labelled_forward(
    model: Any,
    labels: Tensor,
    *args: Any,
    num_items_in_batch: Tensor | float | None = None,
    het_position: Tensor | None = None,
    het_token: Tensor | None = None,
    token_weights: Tensor | None = None,
    logits_to_keep: int = 0,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from ntpseg.memory import HardTokens
    from ntpseg.utils.transformers_compat import CACHE

    outputs = model.model(*args, **kwargs)
    result = model.get_output_embeddings()(
        outputs[0],
        labels=labels.to(outputs[0].device),
        het=None if het_position is None or het_token is None else HardTokens(het_position, het_token),
        num_items=num_items_in_batch,
        token_weights=token_weights,
    )
    return CausalLMOutputWithPast(
        loss=result.loss,
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
        **{CACHE: getattr(outputs, CACHE, None)},
    )


def _head_forward(self: Any, hidden: Tensor, labels: Tensor | None = None, **keywords: Any) -> Tensor | NTPOutput:
    if labels is None:
        return nn.functional.linear(hidden, self.weight)
    return self.ntp_loss(hidden, self.weight, labels, **keywords)


def _check_head(head: nn.Module) -> None:
    if (
        hasattr(head, "base_layer")
        or hasattr(head, "modules_to_save")
        or any("lora_" in n for n, _ in head.named_modules())
    ):
        raise ValueError(
            f"the output head must be a plain linear layer, got {_name(head)}: it is wrapped by an adapter, so its "
            "logits are not hidden @ weight.T. Leave it out of the adapter's target_modules, or merge the adapter first"
        )
    if not isinstance(head, nn.Linear) or not isinstance(head.weight, nn.Parameter):
        raise ValueError(f"the output head must be a plain linear layer, got {_name(head)}")
    if not head.weight.is_floating_point():
        raise ValueError(f"the output head must not be quantised, got a weight of {head.weight.dtype}")
    if getattr(head, "bias", None) is not None:
        raise ValueError("the output head must have no bias, got one")
    hook = getattr(head, "_hf_hook", None)
    if head.weight.device.type == "meta" or getattr(hook, "offload", False):
        raise ValueError(
            "the output head must stay on its device, got one that accelerate offloads between calls: keep it in "
            "device_map on a GPU"
        )


def _name(module: nn.Module) -> str:
    return type(module).__name__
