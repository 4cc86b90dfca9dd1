"""One vocabulary over several ranks: what a row needs from the others, between the kernels.

Every rank has the rows and a contiguous range of the classes. The kernels run on the rank's own classes; the single
logits, the row maximum with its class and the row sum are reduced over the ranks, so that all of them continue with
the same row results. Without a shard nothing here costs anything.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ntpseg.kernels.indexed_dot import indexed_dot
from ntpseg.kernels.tl_utils import INT32_MAX, LOG2E
from ntpseg.kernels.workspace import Anchors, BlockStats


class Shard(Protocol):
    """The classes ``start <= v < start + count`` of `total`; `ntpseg.losses.vocab_parallel` implements it."""

    @property
    def start(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def classes_per_rank(self) -> int:
        """The same number on all ranks."""
        ...

    def local_index(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each token in this shard and whether it is here."""
        ...

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        ...

    def all_reduce_max(self, row_max: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
        """Maximum over the ranks and its class, the lowest on ties; `argmax` counts from this shard."""
        ...


def local_tokens(token: Tensor, shard: Shard | None) -> Tensor:
    """Columns of `token` among the classes of this rank, -1 for those elsewhere and for none."""
    if shard is None:
        return token
    column, here = shard.local_index(token)
    return torch.where(here, column, -1)


def token_logits(hidden: Tensor, weight: Tensor, token: Tensor, shard: Shard | None) -> Tensor:
    """`indexed_dot` of tokens wherever they live; all ranks get the same numbers."""
    logits = indexed_dot(hidden, weight, local_tokens(token, shard))
    return logits if shard is None else shard.all_reduce_sum(logits)


def all_reduce_stats(block_stats: BlockStats, anchors: Anchors, shard: Shard | None) -> BlockStats:
    """The statistics of all classes: with a shard one block, made from the blocks of every rank.

    Args:
        block_stats: of this rank's classes; no block at all where it has none.
        anchors: those they were taken at.
        shard: how to reduce; None returns `block_stats`.
    """
    if shard is None:
        return block_stats
    row_max = torch.full_like(anchors.target_logit, -torch.inf)
    argmax = torch.full(row_max.shape, INT32_MAX.value, dtype=torch.int32, device=row_max.device)
    row_sum = torch.zeros_like(row_max)
    anchor = _anchor_used(row_max, anchors)
    if block_stats.row_max.shape[0]:
        row_max = block_stats.row_max.amax(0)
        argmax = torch.where(block_stats.row_max == row_max, block_stats.argmax, argmax).amin(0)
        anchor = _anchor_used(row_max, anchors)
        row_sum = (block_stats.row_sum * torch.exp2(_anchor_used(block_stats.row_max, anchors) - anchor)).sum(0)
    global_max, argmax = shard.all_reduce_max(row_max, argmax.long())
    row_sum = shard.all_reduce_sum(row_sum * torch.exp2(anchor - _anchor_used(global_max, anchors)))
    return BlockStats(row_sum.unsqueeze(0), global_max.unsqueeze(0), argmax.int().unsqueeze(0))


def _anchor_used(row_max: Tensor, anchors: Anchors) -> Tensor:
    """What sums with this maximum were taken at, see `ntpseg.kernels.tl_utils.anchored_exp`."""
    return torch.where(row_max > anchors.limit, row_max * LOG2E.value, anchors.anchor)
