"""Bytes of activations: what autograd keeps of a decoder layer for backward, and what backward adds for a moment.

The count of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198,
section 4.1), made anew for the layers that are trained here: RMS norms, rotary queries and keys, gated MLPs, no dropout
masks, and attention that keeps no probabilities (FlashAttention, arXiv 2205.14135) or those of blocks of queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from ntpseg.cluster.planning.numerics import Numerics
from ntpseg.cluster.workload import Workload
from ntpseg.models.causal_blocks import MAX_TOKENS, MIN_TOKENS, query_blocks


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one decoder layer and one micro-batch.

    Attributes:
        kept: until the layer's backward, without its input.
        input: its input, a part of the residual stream.
        backward: what its backward has for a moment beyond `kept`.
    """

    kept: int
    input: int
    backward: int


def layer_activations(work: Workload, numerics: Numerics, samples: int, tokens: int | None = None) -> LayerActivations:
    """Activations of one layer for `samples` sequences of `tokens` tokens.

    Per token, with D hidden, I intermediate features, E_q and E_k widths of queries and of keys, s bytes a number (and
    r in the residual stream)::

        norms       r D (the residual between attention and MLP) + 2 s D
        query norm  s (E_q + E_k), Qwen3 alone
        attention   s (2 E_q + 2 E_k) and 4 bytes a head (queries, output; keys, values; log-sum-exp)
        MLP         4 s I (gate, its SiLU, up, their product)

    Attention in blocks (causal_blocks, on a CPU) keeps, in place of the log-sum-exp, the probabilities of each block of
    queries over the keys up to the block's end, with prefix_lm at least all of the prompt's. Backward peaks within the
    MLP: gradients of three ``[N, I]`` tensors in place of one of the four that are kept, and one of the residual
    stream; or within blocked attention, where the MLP's are gone already: gradients of its result, queries, keys and
    values, and one sample's block of scores. Eager attention is one such block of all samples, three times.
    """
    length = work.longest if tokens is None else tokens
    count = samples * length
    size, residual = numerics.product_bytes, numerics.residual_bytes
    width, query, key = work.sizes.hidden, work.sizes.query_width, work.sizes.key_width
    # The float32 scale of each row of each norm.
    kept = count * (residual * width + 2 * size * width + 8)
    if work.sizes.query_norm:
        # PyTorch's norm on a GPU is computed in float32 under autocast, and keeps its operand so.
        operand = 4 if numerics.autocast and numerics.device == "cuda" else size
        kept += count * (operand * (query + key) + 4 * (work.sizes.query_heads + work.sizes.key_heads))
    mlp = count * 4 * size * work.sizes.intermediate
    backward = count * (2 * size * work.sizes.intermediate + residual * width)
    if numerics.fused_attention(work.attention, length, range(MIN_TOKENS, MAX_TOKENS + 1)):
        # causal_blocks repeats keys and values for every query head, also where it then calls PyTorch's kernel.
        own = query if numerics.device == "cpu" and work.attention in (None, "causal_blocks") else key
        kept += count * (size * (2 * query + 2 * own) + 4 * work.sizes.query_heads)
    else:
        blocks = [(0, length)] if work.attention == "eager" else query_blocks(length)
        prefix = 0 if work.causal_tokens is None else length - work.causal_tokens
        sizes = [work.sizes.query_heads * (stop - start) * max(stop, prefix) * size for start, stop in blocks]
        kept += count * size * 4 * query + samples * sum(sizes)
        within = 4 * count * size * query + max(sizes)
        if work.attention == "eager":
            within = 3 * samples * max(sizes)
        backward = max(backward, within - mlp)
    return LayerActivations(kept=kept + mlp, input=count * residual * width, backward=backward)
