"""``attention: causal_blocks``: plain causal attention in blocks of queries, the quickest on a CPU at our lengths.

PyTorch's fused CPU kernel spends most of its time outside matrix products at a few hundred tokens, its backward in
bfloat16 above all. Plain products reach the CPU's matrix units; cutting the queries in two skips a quarter of the
scores. It is the default for training on a CPU; anything but a causal square goes to PyTorch's kernel. Of packed rows
each sequence is computed by itself, so that nothing is spent on what lies between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "causal_blocks"
BLOCKS = 2
# Longer sequences would keep too many probabilities for backward.
MAX_TOKENS = 1024


def causal_blocks(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Causal attention, ``softmax(scale * Q K^T + causal mask) V``.

    Args:
        query, key, value: ``[B, H, T, D]`` of one dtype.
        scale: ``1 / sqrt(D)`` by default.

    Returns:
        ``[B, H, T, D]``.
    """
    length = query.shape[2]
    step = -(-length // BLOCKS)
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    outputs = []
    for start in range(0, length, step):
        stop = min(length, start + step)
        scores = query[:, :, start:stop] @ key[:, :, :stop].transpose(-1, -2)
        scores = scores + _mask(start, stop, scores.dtype, scores.device)
        outputs.append(scores.softmax(-1) @ value[:, :, :stop])
    return torch.cat(outputs, 2)


@lru_cache(maxsize=64)
def _mask(start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((stop - start, stop), float("-inf"), dtype=dtype, device=device).triu(1 + start)


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
        module, query, key, value, attention_mask, dropout, scaling: as Hugging Face gives them.
        packed_bounds: of packed rows, where each sequence begins in ``B * T`` tokens, and the end.
        packed_causal: each packed sequence is causal, and the mask is to be ignored.
        **kwargs: what other implementations read.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    # Autocast leaves rotated queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if packed_bounds is None:
        out = _one(query, key, value, attention_mask, dropout, scaling)
    else:
        length, pieces = query.shape[2], []
        for start, stop in pairwise(packed_bounds):
            row, begin = divmod(start, length)
            part = (slice(row, row + 1), slice(None), slice(begin, begin + stop - start))
            mask = None if packed_causal or attention_mask is None else attention_mask[part][..., part[2]]
            pieces.append(_one(query[part], key[part], value[part], mask, dropout, scaling))
        # The sequences lie end to end: one row of all tokens, cut into rows again.
        flat = torch.cat(pieces, 2)
        out = flat.unflatten(2, (query.shape[0], length))[0].transpose(0, 1)
    return out.transpose(1, 2).contiguous(), None


def _one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    square = query.shape[2] == key.shape[2]
    if mask is None and square and 1 < query.shape[2] <= MAX_TOKENS and not dropout:
        return causal_blocks(query, key, value, scale=scaling)
    causal = mask is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=causal
    )


def register() -> None:
    """Make the name known to transformers; its mask is the one of sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
