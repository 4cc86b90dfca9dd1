"""Attention of one or a few new tokens per row over a preallocated cache of keys and values."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F


class KeyValueCache:
    """Keys and values of one layer in one buffer ``[B, 2 * kv_heads, capacity, head_dim]``, keys first.

    A row's token at position p lies in slot p. Rows may stand at different positions: what lies beyond a row's length
    is never looked at and is overwritten when the row gets there, so taking tokens back costs nothing.
    """

    def __init__(self, batch: int, kv_heads: int, capacity: int, head_dim: int, like: Tensor) -> None:
        self.kv_heads = kv_heads
        # Zeros, not uninitialised memory: a NaN in a slot that the mask hides would still reach the result as 0 * NaN.
        self.buffer = like.new_zeros(batch, 2 * kv_heads, capacity, head_dim)

    def emptied(self, batch: int) -> KeyValueCache:
        """A cache of the first `batch` rows in the same memory, with zeros in it."""
        cache = copy.copy(self)
        cache.buffer = self.buffer[:batch]
        # Another batch may have left a NaN behind.
        cache.buffer.zero_()
        return cache

    def write(self, start: int, new: Tensor) -> None:
        """Store `new` ``[B, q, 2 * kv_heads, head_dim]`` at the same slots of every row, from `start`."""
        self.buffer[:, :, start : start + new.shape[1]] = new.transpose(1, 2)

    def scatter(self, rows: Tensor, slots: Tensor, new: Tensor) -> None:
        """Store `new` ``[..., 2 * kv_heads, head_dim]`` at `rows` and `slots`, which broadcast to ``[...]``."""
        self.buffer[rows, :, slots] = new

    def read(self, length: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` slots, each ``[B, kv_heads, length, head_dim]``.

        They are views; copies where only some `rows`, int64 ``[A]``, are read.
        """
        held = self.buffer[:, :, :length]
        if rows is not None:
            held = held[rows]
        return held[:, : self.kv_heads], held[:, self.kv_heads :]


def prompt_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention within the prompt, causal unless `visible` says otherwise.

    Args:
        query: ``[B, P, heads, head_dim]``.
        key, value: ``[B, P, kv_heads, head_dim]``; head h reads key-value head ``h // (heads // kv_heads)``.
        visible: bool ``[B, 1, 1 or P, P]``, which tokens each query sees.

    Returns:
        ``[B, P, heads * head_dim]``.
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=visible, is_causal=visible is None
    )
    return out.transpose(1, 2).flatten(2)


def step_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of q new tokens per row over the cache, which already holds them.

    The heads that share a key-value head are folded into the query length, so grouped queries read each key once
    instead of copying it.

    Args:
        query: ``[B, q, heads, head_dim]``.
        key, value: ``[B, kv_heads, T, head_dim]``.
        visible: bool ``[B, 1, q, T]``; None where every query sees all T slots.

    Returns:
        ``[B, q, heads * head_dim]``.
    """
    batch, new, heads, dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    folded = query.view(batch, new, kv_heads, groups, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    if visible is not None:
        visible = visible.repeat(1, 1, groups, 1) if new > 1 else visible.expand(-1, -1, groups, -1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=visible)
    out = out.view(batch, kv_heads, groups, new, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, new, heads * dim)


def visible_slots(positions: Tensor, length: int) -> Tensor:
    """Which of the first `length` slots the tokens at `positions` ``[B, q]`` may see: bool ``[B, 1, q, length]``."""
    slots = torch.arange(length, device=positions.device)
    return (slots <= positions[..., None])[:, None]
