"""Causal attention of PyTorch and others, ``[B, H, T, D]`` in and out."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Whole scores, softmax in float32 as Hugging Face's eager attention does."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    return scores.masked_fill(mask, -torch.inf).softmax(-1, dtype=work).to(query.dtype) @ value


def sdpa(backend: SDPBackend | None) -> Attention:
    """PyTorch's own, its choice or one backend of it."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return call


def flash(module: str) -> Attention:
    """The packages flash-attn (2) and flash_attn_interface (3)."""
    function = importlib.import_module(module).flash_attn_func

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = function(*(x.transpose(1, 2) for x in (query, key, value)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def xformers() -> Attention:
    """xFormers' memory-efficient attention."""
    ops = importlib.import_module("xformers.ops")

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = ops.LowerTriangularMask()
        heads_last = (x.transpose(1, 2) for x in (query, key, value))
        return ops.memory_efficient_attention(*heads_last, attn_bias=mask).transpose(1, 2)

    return call


def flex(length: int, device: torch.device) -> Attention:
    """PyTorch's flex attention, compiled, with a causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask)
