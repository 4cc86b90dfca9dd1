"""Notices a forward that was put in the place of a fused model's after fusing, as Liger does on instances.

Nothing of ours runs in such a forward, so that its loss would be another one in silence. Hooks of the model do run.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ntpseg.losses.deferred_logits import CannotFuse


def watch_forward(model: nn.Module) -> None:
    """Lets a labelled call of a fused model raise a `CannotFuse` where the fused forward did not run in it."""
    model.register_forward_pre_hook(_before)
    model.register_forward_hook(_after, with_kwargs=True)


def unwatch_forward(model: nn.Module) -> None:
    """Undoes `watch_forward`."""
    for hooks, ours in ((model._forward_pre_hooks, _before), (model._forward_hooks, _after)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)


def _before(model: Any, args: tuple[Any, ...]) -> None:
    model.ntp_fusion.forward_ran = False


def _after(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    given = {**dict(zip(model.ntp_fusion.argument_names, args)), **kwargs}
    if given.get("labels") is not None and not model.ntp_fusion.forward_ran:
        raise CannotFuse(
            "model.forward must be the one that fuse_causal_lm put there, got another, put there since: leave out "
            "other replacements of the loss (use_liger_kernel)"
        )
