"""``attention: causal_blocks``: plain causal attention in blocks of queries, the quickest on a CPU at our lengths.

PyTorch's fused CPU kernel spends most of its time outside matrix products at a few hundred tokens, its backward in
bfloat16 above all. Plain products reach the CPU's matrix units; each block of queries skips the keys behind it. The
backward is written out: autograd would fill a whole gradient of keys and values with zeros for every block. One sample
at a time keeps its scores in the cache between the passes over them, and lets products read the layout of the linear
layers without a copy. A prompt that sees itself in both directions widens the blocks of its queries to its end, in each
sample to its own. It is the default for training on a CPU; anything but a square of middle length goes to PyTorch's
kernel. Of packed rows each sequence is computed by itself, so that nothing is spent on what lies between two of them.
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


def causal_blocks(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, prefix: Tensor | None = None
) -> Tensor:
    """Causal attention, ``softmax(scale * Q K^T + causal mask) V``, with a bidirectional prefix where one is given.

    Args:
        query, key, value: ``[B, H, T, D]`` of one dtype, of any strides with D contiguous at best.
        scale: ``1 / sqrt(D)`` by default.
        prefix: ``[B]`` int64 from 0 to T: so many first tokens of a sample see each other; None: no sample has any.

    Returns:
        ``[B, H, T, D]``, a view of contiguous ``[B, T, H, D]``. Can be differentiated once.

    Raises:
        ValueError: `prefix` is not one number from 0 to T for each sample.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        return _operator(query, key, value, scale, prefix)[0].transpose(1, 2)
    return _CausalBlocks.apply(query, key, value, scale, prefix)


def reference(query: Tensor, key: Tensor, value: Tensor, *, scale: float, prefix: Tensor | None = None) -> Tensor:
    """The same by plain operators on the whole square: what `causal_blocks` is tested against, and compilers fuse."""
    scores = scale * (query @ key.transpose(-1, -2))
    return scores.masked_fill(~_seen(prefix, scores.shape[-1], scores.device), float("-inf")).softmax(-1) @ value


def _seen(prefix: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Bool ``[B, 1, T, T]`` (``[T, T]`` without a prefix): whether a query sees a key."""
    place = torch.arange(length, device=device)
    causal = place[:, None] >= place
    if prefix is None:
        return causal
    inside = place < prefix[:, None]
    return (causal | (inside[:, :, None] & inside[:, None]))[:, None]


def _prefixes(prefix: Tensor | None, samples: int, length: int) -> list[int]:
    """Tokens of each sample's prefix."""
    if prefix is None:
        return [0] * samples
    found = prefix.tolist()
    if prefix.dim() != 1 or len(found) != samples or not all(0 <= number <= length for number in found):
        raise ValueError(f"prefix must be {samples} numbers from 0 to {length}, got {found}")
    return found


def _forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: list[Tensor], prefixes: list[int]
) -> Tensor:
    """The result; the probabilities are left in `blocks`, which hold all samples or one for all."""
    samples, heads, length, _ = query.shape
    bounds = query_blocks(length)
    out = _like(query)
    masks = [_mask(stop - start, query.dtype, query.device) for start, stop in bounds]
    for sample, prefix in enumerate(prefixes):
        q, k, v = query[sample], key[sample].transpose(-1, -2), value[sample]
        for (start, stop), block, mask in zip(bounds, blocks, masks, strict=True):
            keys = max(stop, prefix)
            p = _of_sample(block[sample if len(block) == samples else 0], heads, stop - start, keys)
            torch.baddbmm(p, q[:, start:stop], k[..., :keys], beta=0, alpha=scale, out=p)
            inside = min(max(prefix - start, 0), stop - start)
            if inside:
                p[:, :inside, prefix:].fill_(-math.inf)
            if inside < stop - start:
                p[:, inside:, start:].add_(mask[inside:])
            torch.softmax(p, -1, out=p)
            out[sample, :, start:stop].baddbmm_(p, v[:, :keys], beta=0)
    return out


def _sizes(heads: int, length: int, prefixes: list[int]) -> list[int]:
    """Probabilities of each block, of the sample that has most."""
    longest = max(prefixes, default=0)
    return [heads * (stop - start) * max(stop, longest) for start, stop in query_blocks(length)]


def _of_sample(part: Tensor, heads: int, rows: int, keys: int) -> Tensor:
    """A sample's probabilities of a block, ``[H, rows, keys]``: contiguous, unlike columns of a wider block."""
    return part[: heads * rows * keys].view(heads, rows, keys)


def _probabilities(storage: Tensor, samples: int, sizes: list[int]) -> list[Tensor]:
    """Probabilities of each block ``[samples, size]``, views of the beginning of `storage`."""
    parts = storage[: samples * sum(sizes)].split([samples * size for size in sizes])
    return [part.view(samples, size) for part, size in zip(parts, sizes, strict=True)]


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Tensor],
    scale: float,
    prefixes: list[int],
) -> list[Tensor]:
    """Gradients of queries, keys and values, from those of the result and the probabilities of `_forward`."""
    bounds, heads = query_blocks(query.shape[2]), query.shape[1]
    gradients = [_like(t) for t in (query, key, value)]
    for sample, prefix in enumerate(prefixes):
        q, k, v, g = query[sample], key[sample], value[sample].transpose(-1, -2), gradient[sample]
        dq, dk, dv = (t[sample] for t in gradients)
        # The last block has all keys: it writes what the others add to.
        beta = 0
        for (start, stop), block in zip(reversed(bounds), reversed(blocks), strict=True):
            keys, rows = max(stop, prefix), slice(start, stop)
            p = _of_sample(block[sample], heads, stop - start, keys)
            dv[:, :keys].baddbmm_(p.transpose(-1, -2), g[:, rows], beta=beta)
            ds = torch.bmm(g[:, rows], v[..., :keys])
            torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
            dq[:, rows].baddbmm_(ds, k[:, :keys], beta=0, alpha=scale)
            dk[:, :keys].baddbmm_(ds.transpose(-1, -2), q[:, rows], beta=beta, alpha=scale)
            beta = 1
    return gradients


class _CausalBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, prefix: Tensor | None) -> Tensor:
        keep = any(ctx.needs_input_grad)
        samples, heads, length, _ = query.shape
        prefixes = _prefixes(prefix, samples, length)
        blocks = [query.new_empty(samples if keep else 1, size) for size in _sizes(heads, length, prefixes)]
        out = _forward(query, key, value, scale, blocks, prefixes)
        if keep:
            ctx.save_for_backward(query, key, value, *blocks)
            ctx.scale, ctx.prefixes = scale, prefixes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *blocks = ctx.saved_tensors
        return (*_backward(gradient, query, key, value, blocks, ctx.scale, ctx.prefixes), None, None)


# The same as operators, which torch.compile takes as they are: traced, the loops would be unrolled sample by sample.
@torch.library.custom_op("ntpseg::causal_blocks", mutates_args=())
def _operator(query: Tensor, key: Tensor, value: Tensor, scale: float, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
    samples, heads, length, _ = query.shape
    prefixes = _prefixes(prefix, samples, length)
    storage = query.new_empty(samples * heads * length * length)
    blocks = _probabilities(storage, samples, _sizes(heads, length, prefixes))
    out = _forward(query, key, value, scale, blocks, prefixes)
    return out.transpose(1, 2), storage


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
    samples, heads, length, _ = query.shape
    # The whole squares: what the blocks need of them would be another program for every length.
    return _like(query).transpose(1, 2), query.new_empty(samples * heads * length * length)


@torch.library.custom_op("ntpseg::causal_blocks_backward", mutates_args=())
def _operator_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probabilities: Tensor,
    scale: float,
    prefix: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    samples, heads, length, _ = query.shape
    prefixes = _prefixes(prefix, samples, length)
    blocks = _probabilities(probabilities, samples, _sizes(heads, length, prefixes))
    dq, dk, dv = _backward(gradient.transpose(1, 2), query, key, value, blocks, scale, prefixes)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@_operator_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probabilities: Tensor,
    scale: float,
    prefix: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query).transpose(1, 2), _like(key).transpose(1, 2), _like(value).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale, prefix = inputs
    ctx.save_for_backward(query, key, value, output[1], prefix)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, prefix = ctx.saved_tensors
    found = _operator_backward(gradient, *saved, ctx.scale, prefix)
    return (*(t.transpose(1, 2) for t in found), None, None)


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
    prefix_lengths: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's signature: ``[B, H, T, D]`` in, ``[B, T, H, D]`` out.

    Args:
        module, query, key, value, attention_mask, dropout, scaling: as Hugging Face gives them.
        packed_bounds: of packed rows, where each sequence begins in ``B * T`` tokens, and the end.
        packed_causal: each packed sequence is causal but for its prefix, and the mask is to be ignored.
        prefix_lengths: int64, of each row, or of each packed sequence: so many first tokens see each other, all else is
            causal, and the mask is to be ignored.
        **kwargs: what other implementations read.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    # Autocast leaves rotated queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if packed_bounds is None:
        mask = attention_mask if prefix_lengths is None else None
        out = _one(query, key, value, mask, dropout, scaling, prefix_lengths)
    else:
        length, pieces = query.shape[2], []
        for index, (start, stop) in enumerate(pairwise(packed_bounds)):
            row, begin = divmod(start, length)
            part = (slice(row, row + 1), slice(None), slice(begin, begin + stop - start))
            mask = None if packed_causal or attention_mask is None else attention_mask[part][..., part[2]]
            prefix = None if prefix_lengths is None else prefix_lengths[index : index + 1]
            pieces.append(_one(query[part], key[part], value[part], mask, dropout, scaling, prefix))
        # The sequences lie end to end: one row of all tokens, cut into rows again.
        flat = torch.cat(pieces, 2)
        out = flat.unflatten(2, (query.shape[0], length))[0].transpose(0, 1)
    return out.transpose(1, 2).contiguous(), None


def _one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    prefix: Tensor | None,
) -> Tensor:
    square = query.shape[2] == key.shape[2]
    if mask is None and square and MIN_TOKENS <= query.shape[2] <= MAX_TOKENS and not dropout:
        return causal_blocks(query, key, value, scale=scaling, prefix=prefix)
    if prefix is not None:
        mask = _seen(prefix, query.shape[2], query.device)
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
