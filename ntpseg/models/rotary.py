"""RMS norm of queries or keys and their rotary embedding in one function, for training on a CPU.

Hugging Face's attention layers normalise each head, transpose, and rotate by five operators over whole tensors, whose
backward autograd makes of ten more. Here both are one function with its backward written out, a few samples at a time,
so that what one pass writes is still in the cache for the next.

Formulas: RMS norm of Zhang and Sennrich (arXiv 1910.07467), rotary embedding of Su et al. (arXiv 2104.09864) in the
half-split form of Hugging Face's Llama and Qwen, ``n cos + rotate_half(n) sin``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

# Elements of queries that are worked on at a time, 0.5 MiB in float32.
_AT_A_TIME = 2**17


def norm_rotary(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """``rotary(weight * x / sqrt(mean(x^2) + eps))`` of every head.

    Args:
        x: ``[B, T, H, D]`` float32 or float64, contiguous at best.
        weight: ``[D]`` of the norm; None: no norm.
        eps: of the norm.
        cos, sin: ``[1 or B, T, D]``, both halves of D alike, as Hugging Face's tables are.

    Returns:
        ``[B, H, T, D]``, a view of contiguous ``[B, T, H, D]``. Can be differentiated once, by `x` and `weight`.
    """
    return _NormRotary.apply(x, weight, eps, cos, sin).transpose(1, 2)


def reference(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """The same by plain operators."""
    if weight is not None:
        x = weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    first, second = x.chunk(2, -1)
    return (x * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)).transpose(1, 2)


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        half = x.shape[-1] // 2
        scale = None
        if weight is not None:
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
            scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        # Without a norm the gradient does not depend on it.
        ctx.save_for_backward(x if weight is not None else None, weight, scale, cos, sin)
        # The weight goes into the tables, which are smaller.
        wide_cos = cos if weight is None else cos * weight
        wide_sin = sin if weight is None else sin * weight.roll(half)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part in _parts(x):
            c, s = _rows(wide_cos, part), _rows(wide_sin, part)
            n = x[part] if scale is None else x[part] * scale[part]
            y = torch.mul(n, c, out=out[part])
            y[..., :half].addcmul_(n[..., half:], s[..., :half], value=-1)
            y[..., half:].addcmul_(n[..., :half], s[..., half:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, scale, cos, sin = ctx.saved_tensors
        half = gradient.shape[-1] // 2
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        weight_gradient = None if weight is None else torch.zeros_like(weight)
        for part in _parts(gradient):
            g, c, s = gradient[part], _rows(cos, part), _rows(sin, part)
            d = torch.mul(g, c, out=out[part])
            d[..., :half].addcmul_(g[..., half:], s[..., half:])
            d[..., half:].addcmul_(g[..., :half], s[..., :half], value=-1)
            if weight is None:
                continue
            n = x[part] * scale[part]
            weight_gradient += (d * n).flatten(0, -2).sum(0)
            projection = torch.linalg.vecdot(d.mul_(weight), n).div_(x.shape[-1]).unsqueeze(-1)
            d.addcmul_(n, projection, value=-1).mul_(scale[part])
        return out, weight_gradient, None, None, None


def _parts(x: Tensor) -> list[slice]:
    """Samples ``[B, T, H, D]`` that are worked on together."""
    step = max(1, _AT_A_TIME // max(1, x[:1].numel()))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _rows(table: Tensor, part: slice) -> Tensor:
    return table if len(table) == 1 else table[part]


def replace_rotary(backbone: Any) -> None:
    """Let the attention layers of a Llama or Qwen3 backbone use `norm_rotary` where it is quicker; all names stay."""
    for layer in backbone.layers:
        attention = layer.self_attn
        if type(attention).__name__ in ("LlamaAttention", "Qwen3Attention"):
            attention.__class__ = _rotary_class(cast(Any, type(attention)))


@cache
def _rotary_class(base: Any) -> Any:
    return type(base.__name__, (_RotaryAttention, base), {"__module__": base.__module__})


def _empty(base: Any) -> Any:
    made = _rotary_class(base)
    return made.__new__(made)


class _RotaryAttention(nn.Module):
    """Hugging Face's attention layer, whose forward without a cache on a CPU is written anew around `norm_rotary`."""

    config: Any
    head_dim: int
    scaling: float
    attention_dropout: float
    sliding_window: int | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made here and has Hugging Face's name: it cannot be found by it.
        return _empty, (type(self).__bases__[1],), self.__dict__

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *arguments: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Hugging Face's: ``[B, T, D]`` in and out, and the probabilities where the implementation gives them."""
        names = ("cache", "past_key_values")
        cached = arguments or any(kwargs.get(name) is not None for name in names)
        if cached or position_embeddings is None or not _quick(self, hidden_states, position_embeddings):
            return super().forward(hidden_states, position_embeddings, attention_mask, *arguments, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in names}
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        cos, sin = position_embeddings
        query = norm_rotary(self.q_proj(hidden_states).view(shape), *_norm(self, "q_norm"), cos, sin)
        key = norm_rotary(self.k_proj(hidden_states).view(shape), *_norm(self, "k_norm"), cos, sin)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if hasattr(self, "sliding_window"):
            kwargs["sliding_window"] = self.sliding_window
        dropout = self.attention_dropout if self.training else 0.0
        attend = _interface(self.config._attn_implementation)
        out, probabilities = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(*shape[:-2], -1)), probabilities


def _interface(name: str) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def _norm(attention: nn.Module, name: str) -> tuple[Tensor | None, float]:
    norm: Any = getattr(attention, name, None)
    return (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)


def _quick(attention: Any, hidden_states: Tensor, tables: tuple[Tensor, Tensor]) -> bool:
    dtype = hidden_states.dtype
    return (
        hidden_states.device.type == "cpu"
        and dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        # Eager attention is a function of each model's own module.
        and attention.config._attn_implementation != "eager"
        and all(table.dim() == 3 and table.dtype == dtype for table in tables)
        and tables[0].shape[-1] == attention.head_dim
    )
