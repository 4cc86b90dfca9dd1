"""The comparison of a fused model with itself: the loss and the gradients at the head, on a few random tokens."""

from __future__ import annotations

import contextlib
import math
import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntpseg.losses import lm_head
from ntpseg.losses.deferred_logits import CannotFuse, DeferredLogits
from ntpseg.losses.fused_call import Call, labelled_forward
from ntpseg.losses.lm_head import linear_of
from ntpseg.losses.options import LossOptions

_ROWS, _TOKENS = 2, 12
# Of the loss and, in norm, of the gradients. The model's own logits are rounded to its dtype, ours are not.
_TOLERANCES = {
    torch.float64: (1e-4, 5e-3),  # transformers computes the loss in float32 all the same
    torch.float32: (1e-4, 5e-3),
    torch.float16: (1e-2, 3e-2),
    torch.bfloat16: (3e-2, 0.15),
}
_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft")


def weights_are_here(model: nn.Module) -> bool:
    """False where the weights are on the meta device, or sharded by ZeRO-3, FSDP or tensor parallelism."""
    for parameter in model.parameters():
        if parameter.device.type == "meta" or hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
            return False
    return not any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())


def check_fusion(model: Any) -> None:
    """Compares the fused loss (``negatives=0``) with the model's own, and the gradients of its head's operands.

    Leaves no trace: random state, buffers, training mode, gradients and the user's hooks are as before. Hooks of the
    head itself do run, as they may change its output.

    Raises:
        ValueError: they differ, or the model does not run on random tokens.
    """
    fusion = model.ntp_fusion
    name = type(model).__name__
    with undisturbed(model):
        batch = _random_batch(model)
        run = _run if weights_are_here(model) else _run_sharded
        try:
            found, own = run(model, batch)
        except CannotFuse:
            raise
        except Exception as error:
            raise CannotFuse(
                f"model must run on {_ROWS} rows of {_TOKENS} random tokens to compare its own loss with the fused "
                f"one, got {type(error).__name__} from {name}: {error}. With check=False nothing is compared"
            ) from error
        if not math.isfinite(own.loss):
            raise CannotFuse(
                f"model must have a finite loss on random tokens to be compared, got {own.loss} from {name}: are its "
                "weights loaded? With check=False nothing is compared"
            )
        loss_tolerance, tolerance = _tolerances(next(iter(own.gradients.values())))
        loss_error = abs(found.loss - own.loss) / max(1.0, abs(own.loss))
        errors = {part: _error(found.gradients[part], gradient) for part, gradient in own.gradients.items()}
    worst = max(errors, key=lambda part: errors[part])
    if loss_error <= loss_tolerance and errors[worst] <= tolerance:
        fusion.check_pending = False
        return
    if loss_error > loss_tolerance:
        what = f"a loss of {found.loss:.6g} where its own is {own.loss:.6g}"
    else:
        what = f"gradients of the head's {worst} that differ by {errors[worst]:.2g} of their norm"
    raise CannotFuse(
        f"the fused loss must be the model's own, got {what} from {name} with negatives=0. Likely cause: "
        f"{_likely_cause(loss_error > loss_tolerance, model)}. With check=False nothing is compared"
    )


def _likely_cause(loss_differs: bool, model: Any) -> str:
    head = model.get_output_embeddings()
    if head._forward_hooks or head._forward_pre_hooks:
        return "a hook of the output head changes what goes in or out"
    if loss_differs:
        return "its forward changes logits or labels on the way to self.loss_function, or passes that further arguments"
    return "its forward changes the gradient between the output head and the loss"


@dataclass(frozen=True)
class _Result:
    """A loss and the gradients at the head, by the names of its operands."""

    loss: float
    gradients: dict[str, Tensor]


_OPERANDS = ("hidden states", "weight", "bias")


def _run(model: Any, batch: dict[str, Tensor]) -> tuple[_Result, _Result]:
    """The fused loss and the model's own, each by its own backward pass from the loss to the head."""

    def once(own: bool) -> _Result:
        call = Call(head=model.get_output_embeddings(), options=_options(model), own=own, detach=True)
        loss = _loss(labelled_forward(model, call, dict(batch)))
        if call.leaves is None:
            raise CannotFuse("model.get_output_embeddings() must be what computes the logits, got a module not used")
        leaves = {part: leaf for part, leaf in zip(_OPERANDS, call.leaves) if leaf is not None}
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return _Result(float(loss.detach()), dict(zip(leaves, gradients)))

    return once(own=False), once(own=True)


@torch.no_grad()
def _run_sharded(model: Any, batch: dict[str, Tensor]) -> tuple[_Result, _Result]:
    """The same where weights come and go: a backward pass would set off what shards them in the middle of a forward.

    The losses are those of two forward passes. The gradients are both made inside of the head, where its weight is: the
    model's own by the cross-entropy of transformers on logits to which is done what the model did to the deferred ones.
    """
    gradients: list[dict[str, Tensor]] = []

    @torch.enable_grad()
    def inspect(logits: DeferredLogits, weight: Tensor, bias: Tensor | None, labels: Tensor, options: Any) -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        operands = {"hidden states": logits.hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
        leaves = {part: operand.detach().requires_grad_() for part, operand in operands.items()}
        hidden, matrix, offset = leaves["hidden states"], leaves["weight"], leaves.get("bias")
        fused = lm_head.ntp_loss(hidden, matrix, labels, bias=offset, options=options).loss
        z = logits.finish(nn.functional.linear(hidden, matrix, offset))
        own = ForCausalLMLoss(z, labels, z.shape[-1])
        for loss in (fused, own):
            gradients.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())))))

    head = model.get_output_embeddings()
    fused = _loss(labelled_forward(model, Call(head=head, options=_options(model), inspect=inspect), dict(batch)))
    own = _loss(labelled_forward(model, Call(head=head, options=_options(model), own=True), dict(batch)))
    return _Result(float(fused), gradients[0]), _Result(float(own), gradients[1])


def _options(model: Any) -> LossOptions:
    return LossOptions(negatives=0, backend=model.ntp_fusion.options.backend)


def _loss(out: Any) -> Tensor:
    return out["loss"] if isinstance(out, dict) else out[0]


def _random_batch(model: Any) -> dict[str, Tensor]:
    """Ids and labels ``[2, 12]``, the same on every rank, without the ids that the configuration has names for."""
    configs = [model.config, model.config.get_text_config()]
    special = {
        value
        for config in configs
        for name, value in config.to_dict().items()
        if isinstance(value, int) and name.endswith(("_id", "_index", "_token"))
    }
    embedding = model.get_input_embeddings()
    sizes = [getattr(config, "vocab_size", None) for config in configs]
    sizes += [getattr(embedding, "num_embeddings", None), linear_of(model.get_output_embeddings()).out_features]
    size = min(int(size) for size in sizes if size)
    plain = torch.tensor([id_ for id_ in range(min(size, 4096)) if id_ not in special] or [0])
    ids = plain[torch.randint(len(plain), (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))]
    device = next(iter(embedding.parameters())).device
    if device.type == "meta":  # accelerate brings it in for the call
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None) or torch.device("cpu")
    ids = ids.to(device)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def _error(found: Tensor, truth: Tensor) -> float:
    norm = torch.linalg.vector_norm
    return float(norm((found - truth).float()) / norm(truth.float()).clamp_min(1e-20))


def _tolerances(hidden: Tensor) -> tuple[float, float]:
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float32 and hidden.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        dtype = torch.float16
    return _TOLERANCES.get(dtype, _TOLERANCES[torch.bfloat16])


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients, and everything as before at the end."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    hooks = {module: _without_user_hooks(module) for module in modules if module is not _head(model)}
    buffers = [
        (module, name, buffer, None if buffer.device.type == "meta" else buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        for module in modules:
            module.training = False
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        known = dict(zip(modules, training))
        for module in model.modules():  # a model may put in other ones in its first call (BigBird's short attention)
            module.training = known.get(module, known[model])
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if value is not None and not torch.equal(value, buffer):
                with torch.no_grad():
                    buffer.copy_(value)
        for module, saved in hooks.items():
            for kind, table in saved.items():
                _restore_hooks(module, kind, table)


def _head(model: Any) -> nn.Module:
    return linear_of(model.get_output_embeddings())


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _without_user_hooks(module: nn.Module) -> dict[str, list[tuple[int, Any]]]:
    """Takes the hooks out that no library put there; returns them all, in order."""
    taken = {}
    for kind in _HOOKS:
        table: OrderedDict[int, Any] = getattr(module, kind)
        if table and not all(map(_of_a_library, table.values())):
            taken[kind] = list(table.items())
            for key in [key for key, hook in table.items() if not _of_a_library(hook)]:
                del table[key]
    return taken


def _restore_hooks(module: nn.Module, kind: str, saved: list[tuple[int, Any]]) -> None:
    """In place, since the handles that remove hooks know this very table; hooks that a library added meanwhile stay."""
    table = getattr(module, kind)
    added = [(key, hook) for key, hook in table.items() if key not in dict(saved)]
    table.clear()
    table.update([*saved, *added])


def _of_a_library(hook: Any) -> bool:
    while hasattr(hook, "func"):
        hook = hook.func
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    return origin.split(".")[0] in _LIBRARIES
