"""``attention: causal_blocks``: plain causal attention in blocks of queries, the quickest on a CPU at our lengths.

PyTorch's fused CPU kernel spends most of its time outside matrix products at a few hundred tokens, its backward in
bfloat16 above all. Plain products reach the CPU's matrix units; each block of queries skips the keys behind it. The
backward is written out: autograd would fill a whole gradient of keys and values with zeros for every block. One sample
at a time keeps its scores in the cache between the passes over them, and lets products read the layout of the linear
layers without a copy. It is the default for training on a CPU; anything but a causal square of middle length goes to
PyTorch's kernel. Of packed rows each sequence is computed by itself, so that nothing is spent on what lies between two
of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "causal_blocks"
# Queries of a block, about: smaller ones skip more of the square, and their products are slower.
BLOCK = 105
# Below, PyTorch's kernel costs less than the many small operators; above, too many probabilities are kept for backward.
MIN_TOKENS = 96
MAX_TOKENS = 1024


def causal_blocks(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Causal attention, ``softmax(scale * Q K^T + causal mask) V``.

    Args:
        query, key, value: ``[B, H, T, D]`` of one dtype, of any strides with D contiguous at best.
        scale: ``1 / sqrt(D)`` by default.

    Returns:
        ``[B, H, T, D]``, a view of contiguous ``[B, T, H, D]``. Can be differentiated once.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        return _operator(query, key, value, scale)[0].transpose(1, 2)
    return _CausalBlocks.apply(query, key, value, scale)


def reference(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """The same by plain operators on the whole square: what `causal_blocks` is tested against, and compilers fuse."""
    scores = scale * (query @ key.transpose(-1, -2))
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(mask, float("-inf")).softmax(-1) @ value


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: list[Tensor]) -> Tensor:
    """The result; the probabilities are left in `blocks`, which hold all samples or one for all."""
    samples, _, length, _ = query.shape
    bounds = query_blocks(length)
    out = _like(query)
    masks = [_mask(stop - start, query.dtype, query.device) for start, stop in bounds]
    for sample in range(samples):
        q, k, v = query[sample], key[sample].transpose(-1, -2), value[sample]
        for (start, stop), block, mask in zip(bounds, blocks, masks, strict=True):
            p = block[sample if len(block) == samples else 0]
            torch.baddbmm(p, q[:, start:stop], k[..., :stop], beta=0, alpha=scale, out=p)
            p[..., start:].add_(mask)
            torch.softmax(p, -1, out=p)
            out[sample, :, start:stop].baddbmm_(p, v[:, :stop], beta=0)
    return out


def _probabilities(samples: int, heads: int, storage: Tensor, length: int) -> list[Tensor]:
    """Probabilities of each block ``[samples, H, rows, columns]``, views of the beginning of `storage`."""
    shapes = [(samples, heads, stop - start, stop) for start, stop in query_blocks(length)]
    parts = storage[: sum(map(math.prod, shapes))].split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """Gradients of queries, keys and values, from those of the result and the probabilities of `_forward`."""
    bounds = query_blocks(query.shape[2])
    gradients = [_like(t) for t in (query, key, value)]
    for sample in range(len(query)):
        q, k, v, g = query[sample], key[sample], value[sample].transpose(-1, -2), gradient[sample]
        dq, dk, dv = (t[sample] for t in gradients)
        # The last block has all keys: it writes what the others add to.
        beta = 0
        for (start, stop), block in zip(reversed(bounds), reversed(blocks), strict=True):
            p, rows = block[sample], slice(start, stop)
            dv[:, :stop].baddbmm_(p.transpose(-1, -2), g[:, rows], beta=beta)
            ds = torch.bmm(g[:, rows], v[..., :stop])
            torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
            dq[:, rows].baddbmm_(ds, k[:, :stop], beta=0, alpha=scale)
            dk[:, :stop].baddbmm_(ds.transpose(-1, -2), q[:, rows], beta=beta, alpha=scale)
            beta = 1
    return gradients


class _CausalBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keep = any(ctx.needs_input_grad)
        samples, heads, length, _ = query.shape
        kept = samples if keep else 1
        blocks = [query.new_empty(kept, heads, stop - start, stop) for start, stop in query_blocks(length)]
        out = _forward(query, key, value, scale, blocks)
        if keep:
            ctx.save_for_backward(query, key, value, *blocks)
            ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *blocks = ctx.saved_tensors
        return (*_backward(gradient, query, key, value, blocks, ctx.scale), None)


# The same as operators, which torch.compile takes as they are: traced, the loops would be unrolled sample by sample.
@torch.library.custom_op("ntpseg::causal_blocks", mutates_args=())
def _operator(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    samples, heads, length, _ = query.shape
    storage = query.new_empty(samples * heads * length * length)
    out = _forward(query, key, value, scale, _probabilities(samples, heads, storage, length))
    return out.transpose(1, 2), storage


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    samples, heads, length, _ = query.shape
    # The whole squares: what the blocks need of them would be another program for every length.
    return _like(query).transpose(1, 2), query.new_empty(samples * heads * length * length)


@torch.library.custom_op("ntpseg::causal_blocks_backward", mutates_args=())
def _operator_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    samples, heads, length, _ = query.shape
    blocks = _probabilities(samples, heads, probabilities, length)
    dq, dk, dv = _backward(gradient.transpose(1, 2), query, key, value, blocks, scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@_operator_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query).transpose(1, 2), _like(key).transpose(1, 2), _like(value).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = _operator_backward(gradient, *ctx.saved_tensors, ctx.scale)
    return (*(t.transpose(1, 2) for t in found), None)


_operator.register_autograd(_differentiate, setup_context=_save)


def _like(tensor: Tensor) -> Tensor:
    """An empty tensor ``[B, H, T, D]`` in the layout of the linear layers, contiguous ``[B, T, H, D]``."""
    samples, heads, length, width = tensor.shape
    return tensor.new_empty(samples, length, heads, width).transpose(1, 2)


def query_blocks(length: int) -> list[tuple[int, int]]:
    """First and one past the last query of each block."""
    step = -(-length // max(1, round(length / BLOCK)))
    return [(start, min(length, start + step)) for start in range(0, length, step)]


@lru_cache(maxsize=64)
def _mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu_(1)


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
    if mask is None and square and MIN_TOKENS <= query.shape[2] <= MAX_TOKENS and not dropout:
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
