"""One call that makes a Hugging Face causal language model train without ever holding its logits.

    model = fuse_causal_lm(AutoModelForCausalLM.from_pretrained(...), negatives=5)
    Trainer(model, args, train_dataset=...).train()

With labels the model's own forward runs, but its output head returns `DeferredLogits`, which record what the model
does to its logits, and its ``loss_function`` hands them back to the head, which computes the loss inside its own
``__call__`` (so ZeRO-3 and FSDP find its weight gathered). What the model adds to its loss (auxiliary losses of
mixtures of experts) and what it returns besides stays its own. Without labels nothing changes. A model that goes
another way is refused, never trained on something else in silence.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ntpseg.losses.api import NTPLoss
from ntpseg.losses.batch_arguments import BATCH_KEYS, BatchArguments
from ntpseg.losses.deferred_logits import CannotFuse, DeferredLogits
from ntpseg.losses.forward_guard import unwatch_forward, watch_forward
from ntpseg.losses.fused_call import Call, Fusion, labelled_forward
from ntpseg.losses.lm_head import OUTPUT_FIELDS, check_head, fuse_head, is_fused_head, linear_of, unfuse_head
from ntpseg.losses.options import LossOptions, NTPOutput
from ntpseg.losses.self_check import check_fusion, weights_are_here
from ntpseg.utils.checks import check_bool
from ntpseg.utils.tensor_checks import shown


def fuse_causal_lm(
    model: nn.Module,
    options: LossOptions | None = None,
    *,
    check: bool = True,
    skip_logits: bool | None = None,
    **keywords: Any,
) -> nn.Module:
    """Replaces the loss of a Hugging Face causal language model by `ntp_loss`, in place.

    Works for every model whose ``forward`` passes the logits of its output head, at most scaled or capped, to
    ``self.loss_function``; docs/drop-in.md lists them. Trainer's ``num_items_in_batch`` becomes ``num_items``. A batch
    may also carry

    - ``het_position`` and ``het_token``: ``[B, n]`` int64, see `ntpseg.HardTokens`;
    - ``token_weights``: ``[B, T]`` float;
    - ``num_het_in_batch`` and ``num_weights_in_batch``: one number each, how many hard tokens count and the sum of the
      weights of supervised tokens, over the same micro-batches and ranks as ``num_items_in_batch``; needed where that
      is given (Trainer does) and there are hard tokens or token weights;
    - ``shift_labels``: ``[B, T]`` int64, labels that are shifted already (context parallelism), used in place of
      ``labels``; the positions of hard tokens and token weights then are those of ``shift_labels``;
    - ``skip_logits``: see below.

    The output is the model's own. In training it has no logits; in eval mode they are computed after the loss.

    Args:
        model: a ``PreTrainedModel`` with an output head, or a PEFT model around one. Fuse before
            ``Accelerator.prepare``, which Trainer calls too.
        options: a `LossOptions`, or
        check: compare the fused loss with the model's own, and the gradients at its head, on a few random tokens with
            ``negatives=0``: now, or in the first labelled call where the weights are not here yet (meta device,
            ZeRO-3, FSDP). False also accepts a model that hides classes in its logits (Chameleon: its image tokens)
            by writing -inf or the lowest number there, and leaves that mask out, as training on these classes needs.
        skip_logits: True: no logits in eval mode either; the output then is a `FusedLMOutput`, whose ``prediction``
            and ``nll`` are what Trainer's ``compute_metrics`` is given. None: logits in eval mode only.
        **keywords: the fields of `LossOptions` one by one. TCL and HET are on by default; ``negatives=0`` leaves
            cross-entropy. ``logit_scale`` and ``softcap`` are the model's to say.

    Returns:
        The same model.

    Raises:
        ValueError: the model is none of the above, or (now or in the first labelled call) its loss is not the fused
            one; the message says what is in the way.
    """
    options = NTPLoss(options, **keywords).options
    if options.logit_scale != 1 or options.softcap is not None:
        raise ValueError("logit_scale and softcap must be left to the model, got them as options")
    check_bool("check", check)
    if skip_logits is not None:
        check_bool("skip_logits", skip_logits)
    if not isinstance(model, nn.Module):
        raise CannotFuse(f"model must be a causal language model with an output head, got {shown(model)}")
    inner = _inner(model)
    if is_fused(inner):
        unfuse_causal_lm(model)
    _check_model(inner)

    own = type(inner).forward
    parameters = inspect.signature(own).parameters
    inner.ntp_fusion = Fusion(
        options=options,
        skip_logits=skip_logits,
        ignore_masks=not check,
        argument_names=[name for name in parameters if name not in ("self", "kwargs", "args")],
        takes_shift_labels="shift_labels" in parameters
        or any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()),
    )
    inner.ntp_call = None
    forward: Any = functools.partial(_forward, inner)
    forward.__signature__ = _signature(own)
    _set_forward(inner, forward)
    watch_forward(inner)
    inner._loss_function = functools.partial(_loss_function, inner)
    fuse_head(linear_of(inner.get_output_embeddings()))
    if check:
        inner.ntp_fusion.check_pending = True
        if weights_are_here(inner):
            try:
                check_fusion(inner)
            except Exception:
                unfuse_causal_lm(model)
                raise
    return model


def unfuse_causal_lm(model: nn.Module) -> nn.Module:
    """Undoes `fuse_causal_lm` in place and returns the model; one that is not fused stays as it is."""
    inner = _inner(model)
    for module in inner.modules():
        if is_fused_head(module):
            unfuse_head(module)
    if is_fused(inner):
        unwatch_forward(inner)
        if _is_ours(inner.__dict__.get("_old_forward")):
            inner._old_forward = type(inner).forward.__get__(inner)
        else:
            del inner.forward
        for name in ("ntp_fusion", "ntp_call", "_loss_function"):
            del inner.__dict__[name]
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether the model's loss is the fused one."""
    return "ntp_fusion" in _inner(model).__dict__


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forward(
    model: Any,
    *args: Any,
    num_items_in_batch: Any = None,
    skip_logits: bool | None = None,
    **kwargs: Any,
) -> Any:
    fusion: Fusion = model.ntp_fusion
    fusion.forward_ran = True
    given = BatchArguments(num_items_in_batch, **{name: kwargs.pop(name, None) for name in BATCH_KEYS})
    _check_device(model, (*args, *kwargs.values()))
    if args and args[0] is model:  # accelerate's unwrap_model binds what it finds on the instance once more
        args = args[1:]
    kwargs = {**dict(zip(fusion.argument_names, args)), **kwargs}
    if kwargs.get("labels") is None:
        if num_items_in_batch is not None or _trainer_has_labels(model):
            raise ValueError(
                "labels must reach the model, got none from Trainer: under label_smoothing_factor and "
                "compute_loss_func Trainer takes the labels out and computes the loss from logits. Leave these out; "
                "fuse_causal_lm(model, negatives=0, label_smoothing=...) smooths the labels"
            )
        given.check_labels()
        return type(model).forward(model, **kwargs)
    if fusion.check_pending and not torch.compiler.is_compiling():
        check_fusion(model)
    if skip_logits is None:
        skip_logits = fusion.skip_logits
    call = Call(
        head=model.get_output_embeddings(),
        options=fusion.options,
        ignore_masks=fusion.ignore_masks,
        shift_labels=given.shift_labels,
        tensors=given.loss_arguments(fusion.options),
    )
    if given.shift_labels is not None and fusion.takes_shift_labels:
        # some models choose by them which logits have labels (GIT)
        kwargs["shift_labels"] = given.shift_labels
    out = labelled_forward(model, call, kwargs)
    wanted = not model.training if skip_logits is None else not skip_logits
    return _finished(out, call, wanted, predictions=bool(skip_logits))


def _check_device(model: Any, values: Iterable[Any]) -> None:
    """A replica of DataParallel calls what was put on the model that it is a copy of, whose weights are elsewhere."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type != "cuda":
        return
    for value in values:
        if isinstance(value, Tensor) and value.device.type == "cuda" and value.device != weight.device:
            raise CannotFuse(
                f"inputs must be on the device of the model's embedding, {weight.device}, got {value.device}; is the "
                "model wrapped in DataParallel? Start one process for each GPU (torchrun) instead"
            )


def _trainer_has_labels(model: Any) -> bool:
    """Whether this call comes from a Trainer that has taken the labels out of the batch.

    It passes ``num_items_in_batch`` on all the same, but not to the models that say ``accepts_loss_kwargs = False``:
    for these there is no sign of it but the caller.
    """
    if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "compute_loss":
        frame = frame.f_back  # type: ignore[assignment]  # None above the outermost
    if frame is None or frame.f_locals.get("labels") is None:
        return False
    trainer = frame.f_locals.get("self")
    return any(getattr(trainer, name, None) is not None for name in ("label_smoother", "compute_loss_func"))


def _finished(out: Any, call: Call, logits: bool, *, predictions: bool) -> Any:
    """The model's output with its logits made or left out."""

    def done(value: Any) -> Any:
        if not isinstance(value, DeferredLogits):
            return value
        return value.logits() if logits else None

    if not isinstance(out, dict):
        return tuple(value for value in map(done, out) if value is not None)
    if predictions:
        from ntpseg.losses.fused_output import FusedLMOutput

        assert call.result is not None
        names = [field.name for field in dataclasses.fields(FusedLMOutput)]
        kept = {name: done(out[name]) for name in names if name in out}
        return FusedLMOutput(**kept, prediction=call.result.prediction, nll=call.result.nll)
    return type(out)(**{name: done(value) for name, value in out.items()})


def _loss_function(model: Any, logits: Any, labels: Tensor, vocab_size: int | None = None, **kwargs: Any) -> Tensor:
    """What a fused model's ``self.loss_function`` is."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    call: Call | None = model.ntp_call
    if call is None and torch.is_grad_enabled():
        raise CannotFuse(
            "self.loss_function must be called by the forward of the fused model on labels, got a call outside of it, "
            "where it is plain cross-entropy: take the loss from model(..., labels=labels), or unfuse the model"
        )
    if call is None or call.own:
        classes = vocab_size if vocab_size is not None else logits.shape[-1]
        return ForCausalLMLoss(logits, labels, classes, **kwargs)
    if not isinstance(logits, DeferredLogits):
        raise CannotFuse(
            "model must pass the logits of its output head to self.loss_function, got others: is the head used through "
            "its weight, or another than model.get_output_embeddings()?"
        )
    if call.result is not None:
        raise CannotFuse("model must call self.loss_function once, got a second call")
    options, shift_labels = call.options, kwargs.get("shift_labels")
    if shift_labels is None:
        shift_labels = call.shift_labels
    elif call.shift_labels is not None and shift_labels is not call.shift_labels:
        raise CannotFuse(
            f"model must pass the batch's shift_labels to self.loss_function, got others from {type(model).__name__}"
        )
    if shift_labels is not None:
        labels, options = shift_labels, dataclasses.replace(options, shift=False)
    changes: dict[str, Any] = {"logit_scale": logits.logit_scale, "softcap": logits.softcap}
    if "ignore_index" in kwargs:
        changes["ignore_index"] = kwargs["ignore_index"]
    tensors = dict(call.tensors)
    if kwargs.get("num_items_in_batch") is not None:
        if tensors.get("het") is not None or tensors.get("token_weights") is not None:
            raise CannotFuse(
                "model must leave num_items_in_batch to a batch with hard tokens or token weights, got one from "
                f"{type(model).__name__}"
            )
        tensors["num_items"] = kwargs["num_items_in_batch"]
    result = logits.call_head(
        labels=labels.to(logits.device), options=dataclasses.replace(options, **changes), **tensors
    )
    if not isinstance(result, tuple) or len(result) != len(OUTPUT_FIELDS):
        raise CannotFuse(
            f"hooks of the output head must not change its output, got a {type(result).__name__} after them"
        )
    call.result = NTPOutput(*result)
    return call.result.loss


def _check_model(model: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    name = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise CannotFuse(f"model must be a causal language model with an output head, got {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise CannotFuse(
            f"model must be a decoder alone, got {name}, an encoder-decoder: call ntp_loss on its decoder's hidden "
            "states, with shift=False where each position's logits are for the label at that position (T5 and Bart "
            "shift the decoder's inputs in place of the labels)"
        )
    check_head(head, model)
    loss = getattr(model, "loss_function", None)
    if loss is not ForCausalLMLoss:
        shown = getattr(loss, "__name__", type(loss).__name__)
        raise CannotFuse(f"model.loss_function must be transformers' ForCausalLMLoss, got {shown} in {name}")
    forward = model.__dict__.get("_old_forward" if hasattr(model, "_hf_hook") else "forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(model).forward:
        raise CannotFuse(
            f"model.forward must be that of {name}, got one that was put on the instance: fuse before "
            "Accelerator.prepare, and leave out other replacements of the loss (use_liger_kernel)"
        )


def _set_forward(model: Any, forward: Any) -> None:
    """As the instance's forward, beneath accelerate's hook where there is one."""
    if hasattr(model, "_hf_hook") and hasattr(model, "_old_forward"):
        model._old_forward = forward
    else:
        model.forward = forward


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _forward


def _signature(own: Any) -> inspect.Signature:
    """That of the class's forward and what we take besides, without annotations, which may not pickle."""

    def parameters() -> Iterator[inspect.Parameter]:
        known = [p for p in inspect.signature(own).parameters.values() if p.name != "self"]
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in known]
        names = {p.name for p in plain}
        yield from (p for p in plain if p.kind != inspect.Parameter.VAR_KEYWORD)
        for name in (*BATCH_KEYS, "skip_logits"):
            if name not in names:
                yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        yield from (p for p in plain if p.kind == inspect.Parameter.VAR_KEYWORD)

    return inspect.Signature(list(parameters()))
