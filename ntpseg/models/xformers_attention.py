"""``attention: xformers``: the memory-efficient attention of xFormers behind Hugging Face's interface."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "xformers"
# Rows of a mask must begin at addresses that its kernels can read at once.
_ALIGNED = 8


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_bounds: Sequence[int] | None = None,
    packed_causal: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's signature: ``[B, H, T, D]`` in, ``[B, T, H, D]`` out.

    Args:
        module, query, key, value, attention_mask, dropout, scaling: as Hugging Face gives them; the mask is bool,
            ``[B, 1, T, S]``, True where a query sees a key.
        packed_bounds: of packed rows, where each sequence begins in ``B * T`` tokens, and the end.
        packed_causal: each packed sequence is causal, and the mask is to be ignored.
        **kwargs: what other implementations read.
    """
    ops = importlib.import_module("xformers.ops")
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    groups = getattr(module, "num_key_value_groups", 1)
    # Autocast leaves rotated queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    shape = query.shape
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
    if packed_bounds is not None and packed_causal:
        lengths = [stop - start for start, stop in pairwise(packed_bounds)]
        query, key, value = (x.reshape(1, -1, *x.shape[2:]) for x in (query, key, value))
        seen: Any = bias.BlockDiagonalCausalMask.from_seqlens(lengths)
    elif attention_mask is not None:
        seen = _additive(attention_mask, shape[1], query.dtype)
    elif shape[2] == 1:
        seen = None
    else:
        seen = bias.LowerTriangularMask() if shape[2] == key.shape[1] else bias.LowerTriangularFromBottomRightMask()
    out = ops.memory_efficient_attention(query, key, value, attn_bias=seen, p=dropout, scale=scaling)
    return out.reshape(shape[0], shape[2], shape[1], shape[3]), None


def _additive(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, H, T, S]``: 0 where a query sees a key, the least number elsewhere, its rows aligned."""
    keys = mask.shape[-1]
    padded = F.pad(mask, (0, -keys % _ALIGNED))
    # Not minus infinity: padding that sees nothing would become not-a-number, and what reads it next with it.
    least = torch.finfo(dtype).min
    added = torch.zeros(padded.shape, dtype=dtype, device=mask.device).masked_fill_(~padded, least)
    return added[..., :keys].expand(-1, heads, -1, -1)


def register() -> None:
    """Make the name known to transformers; its mask is the one of sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
