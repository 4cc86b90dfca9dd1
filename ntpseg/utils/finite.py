"""Weights that are numbers: a model whose training diverged holds some that are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def non_finite_tensor(model: nn.Module) -> str | None:
    """The name of the first weight or buffer with a NaN or an infinity, of those that this rank holds."""
    tensors: list[tuple[str, Tensor]] = []
    shards: Any = getattr(model, "_weight_shards", None)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # ZeRO-3, FSDP and a model under construction keep this rank's part elsewhere.
        part: Any = getattr(tensor, "ds_tensor", tensor)
        part = part if shards is None else shards.of.get(part, part)
        part = part.to_local() if hasattr(part, "to_local") else part
        if part.is_floating_point() and part.numel():
            tensors.append((name, part))
    # One look at the device for all of them; one by one only where something is wrong.
    if not tensors or bool(torch.stack([_is_finite(part).cpu() for _, part in tensors]).all()):
        return None
    return next(name for name, part in tensors if not bool(_is_finite(part)))


def _is_finite(tensor: Tensor) -> Tensor:
    # The extremes of a tensor tell as much as a mask of its size does.
    low, high = tensor.detach().aminmax()
    return low.isfinite() & high.isfinite()


def check_finite(module: Any, what: str) -> None:
    """Raise a `ValueError` that names `what` if a weight of `module` is not finite; other objects pass."""
    name = non_finite_tensor(module) if isinstance(module, nn.Module) else None
    if name is not None:
        raise ValueError(
            f"{what} must have finite weights, got nan or inf in {name!r}; its training diverged: train it again"
        )
