"""RMS norms and rotary tables that read and write less memory than Hugging Face's, for training under autocast.

At the sizes that train on a CPU most of a step is not matrix products but passes over activations. Under autocast
Hugging Face's norms return float32, which every linear layer behind one casts to bfloat16 for itself, forward and
backward, and its float32 rotary tables turn queries and keys into float32. Here a norm computes in
float32 and returns autocast's dtype, its backward is written out, and the tables have autocast's dtype. Without
autocast nothing is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _RMSNormFunction(torch.autograd.Function):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis, in float32 (or float64), returned in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = x * scale
        gradient = gradients[0].to(normalised.dtype)
        weight_gradient = (gradient * normalised).flatten(0, -2).sum(0)
        gradient = gradient * weight
        projection = torch.linalg.vecdot(gradient, normalised).div_(x.shape[-1]).unsqueeze(-1)
        return gradient.addcmul_(normalised, projection, value=-1).mul_(scale).to(x.dtype), weight_gradient, None, None


class AutocastRMSNorm(nn.Module):
    """Replaces a Hugging Face RMSNorm and shares its weight.

    Args:
        norm: the module to replace; has ``weight`` ``[D]`` and ``variance_epsilon``.
    """

    weight: nn.Parameter

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., D]``, in autocast's dtype where it is on, else in the dtype of `hidden_states`."""
        dtype = _autocast_dtype(hidden_states)
        if hidden_states.is_cuda:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon).to(dtype)
        return _RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, dtype)

    def extra_repr(self) -> str:
        """As Hugging Face's."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def _autocast_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _cast_rotary_tables(module: nn.Module, arguments: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    dtype = _autocast_dtype(tables[0])
    return tables[0].to(dtype), tables[1].to(dtype)


def replace_norms(backbone: Any) -> None:
    """Replace the norms of a Llama or Qwen backbone, and let its rotary tables follow autocast; all names stay."""
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
                setattr(parent, name, AutocastRMSNorm(child))
    backbone.rotary_emb.register_forward_hook(_cast_rotary_tables)
