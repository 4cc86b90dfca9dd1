"""Sequence parallelism: the ranks of a group share each sequence in the decoder and the vocabulary in the heads.

Every rank of a group has the same batch. Of each sequence it keeps a contiguous part of the hidden states through the
whole decoder; attention alone sees all positions, of a part of its heads, between two all-to-alls (DeepSpeed-Ulysses,
arXiv 2309.14509). Behind the decoder the hidden states are gathered for the loss, whose classes the ranks divide as in
Megatron's vocabulary-parallel cross-entropy (arXiv 1909.08053).

Gradients keep data parallelism's rule, that ranks average them: what a rank has only a part of, it has times the size
of the group. So DDP, ZeRO and FSDP need to know nothing of this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ntpseg.utils.shares import even_share

NAME = "sequence_parallel"
# What may compute the attention of whole sequences behind the exchange; without a mask each is causal.
COMPUTING = ("sdpa", "causal_blocks", "flash_attention_2", "flash_attention_3")


class SequenceGroup:
    """The ranks that share sequences and vocabulary.

    Args:
        group: them; their order is that of the sequence.
        attention: the implementation that computes the attention of whole sequences, one of `COMPUTING`.

    Attributes:
        size, rank: of the group, and in it.
    """

    def __init__(self, group: dist.ProcessGroup, attention: str) -> None:
        self.group, self.attention = group, attention
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def split(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part ``[B, ceil(T / size), D]`` of ``[B, T, D]``, zeros behind the end, and its positions."""
        share = -(-embeds.shape[1] // self.size)
        start, stop = even_share(embeds.shape[1], self.rank, self.size)
        part = F.pad(embeds[:, start:stop], (0, 0, 0, share - (stop - start)))
        return part, torch.arange(self.rank * share, (self.rank + 1) * share, device=embeds.device)[None]

    def gather(self, part: Tensor, length: int) -> Tensor:
        """``[B, T, D]`` of the ranks' parts; each rank must have the whole gradient of the result."""
        return _Gather.apply(part, self)[:, :length]

    def own_classes(self, weight: Tensor) -> Tensor:
        """This rank's rows of the heads' output matrix ``[..., V, D]``, their gradient times the group's size."""
        start, stop = even_share(weight.shape[-2], self.rank, self.size)
        return _ScaleGradient.apply(weight[..., start:stop, :], self.size)


def check_shareable(config: Any, text: Any, size: int) -> None:
    """Refuse a model whose sequences a group of ranks cannot share.

    Args:
        config: an `NTPSegConfig`.
        text: the decoder's, with the attention implementation that is to compute.
        size: ranks of the group.

    Raises:
        ValueError: the attention heads cannot be divided, or an option of the model needs whole sequences.
    """
    if text.num_attention_heads % size:
        raise ValueError(
            f"sequence_parallel_size must divide the {text.num_attention_heads} attention heads, got {size}"
        )
    for name, used in {"prefix_lm": config.prefix_lm, "mask_inputs": config.mask_inputs is not None}.items():
        if used:
            raise ValueError(f"{name} must be off with sequence_parallel_size above 1, got {size}")
    if text._attn_implementation not in COMPUTING:
        raise ValueError(
            f"attention must be one of {', '.join(COMPUTING)} with sequence_parallel_size above 1, got "
            f"{text._attn_implementation!r}"
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: SequenceGroup) -> Tensor:
        ctx.ranks, ctx.share = ranks, part.shape[1]
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(ranks.size)]
        dist.all_gather(parts, part.contiguous(), group=ranks.group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        start = ctx.ranks.rank * ctx.share
        return gradients[0][:, start : start + ctx.share] * ctx.ranks.size, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class _AllToAll(torch.autograd.Function):
    """Cut dimension `cut` among the ranks and join what they send along dimension `join`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: SequenceGroup, cut: int, join: int) -> Tensor:
        ctx.ranks, ctx.cut, ctx.join = ranks, cut, join
        return _exchange(value, ranks, cut, join)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], ctx.ranks, ctx.join, ctx.cut), None, None, None


def _exchange(value: Tensor, ranks: SequenceGroup, cut: int, join: int) -> Tensor:
    sent = torch.stack(value.chunk(ranks.size, cut)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=ranks.group)
    return torch.cat(list(received.unbind()), join)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_group: SequenceGroup,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's signature: ``[B, H, T / size, D]`` in, ``[B, T / size, H, D]`` out.

    Args:
        module, query, key, value, attention_mask: as Hugging Face gives them.
        sequence_group: who has the other positions, and the implementation that computes.
        **kwargs: what that reads.
    """
    from transformers import AttentionInterface

    # Of this rank's part: an implementation that looks for packed sequences in them would find some.
    kwargs.pop("position_ids", None)
    if key.shape[1] % sequence_group.size:
        # Too few to be divided: each rank takes those that its heads read.
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    query, key, value = (_AllToAll.apply(t, sequence_group, 1, 2) for t in (query, key, value))
    groups = getattr(module, "num_key_value_groups", 1)
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    try:
        out, _ = AttentionInterface()[sequence_group.attention](module, query, key, value, None, **kwargs)
    finally:
        module.num_key_value_groups = groups
    return _AllToAll.apply(out, sequence_group, 1, 2), None


def sequence_arguments(ranks: SequenceGroup, position: Tensor) -> dict[str, Any]:
    """What a Hugging Face decoder whose implementation is `NAME` must be given.

    Args:
        ranks: the group.
        position: of this rank's tokens, ``[1, T / size]``.
    """
    # A mask of four dimensions is handed on as it is: none need be made where none is read.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=position.device)
    return {"position_ids": position, "attention_mask": mask, "sequence_group": ranks}


def register() -> None:
    """Make the name known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
