"""One vocabulary over several ranks: what a row needs from the others, between the kernels.

Every rank has the rows and a contiguous range of the classes. The kernels run on the rank's own classes; the single
logits, the row maximum with its class and the row sum are reduced over the ranks, so that all of them continue with
the same row results. Without a shard nothing here costs anything.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ntpseg.kernels.indexed_dot import pair_logits
from ntpseg.kernels.tl_utils import LOG2E, NO_TOKEN
from ntpseg.kernels.workspace import Anchors, Partials


class Shard(Protocol):
    """The classes ``first <= v < first + count`` of `total`; `ntpseg.losses.vocab_parallel` implements it."""

    @property
    def first(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def share(self) -> int:
        """Classes per rank, the same number on all of them."""
        ...

    def local(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each token in this shard and whether it is here."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        ...

    def top(self, top: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Maximum over the ranks and its class, the lowest on ties; `best` counts from this shard."""
        ...


def own_tokens(token: Tensor, shard: Shard | None) -> Tensor:
    """Columns of `token` among the classes of this rank, -1 for those elsewhere and for none."""
    if shard is None:
        return token
    column, here = shard.local(token)
    return torch.where(here, column, -1)


def single_logits(hidden: Tensor, weight: Tensor, token: Tensor, shard: Shard | None) -> Tensor:
    """`pair_logits` of tokens wherever they live; all ranks get the same numbers."""
    found = pair_logits(hidden, weight, own_tokens(token, shard))
    return found if shard is None else shard.sum(found)


def whole_vocabulary(partials: Partials, anchors: Anchors, shard: Shard | None) -> Partials:
    """The statistics of all classes: with a shard one block, made from the blocks of every rank.

    Args:
        partials: of this rank's classes; no block at all where it has none.
        anchors: those they were taken at.
        shard: how to reduce; None returns `partials`.
    """
    if shard is None:
        return partials
    top = torch.full_like(anchors.logit, -torch.inf)
    best = torch.full(top.shape, NO_TOKEN.value, dtype=torch.int32, device=top.device)
    total = torch.zeros_like(top)
    at = _anchor(top, anchors)
    if partials.max.shape[0]:
        top = partials.max.amax(0)
        best = torch.where(partials.max == top, partials.arg, best).amin(0)
        at = _anchor(top, anchors)
        total = (partials.sum * torch.exp2(_anchor(partials.max, anchors) - at)).sum(0)
    highest, best = shard.top(top, best.long())
    total = shard.sum(total * torch.exp2(at - _anchor(highest, anchors)))
    return Partials(total.unsqueeze(0), highest.unsqueeze(0), best.int().unsqueeze(0))


def _anchor(top: Tensor, anchors: Anchors) -> Tensor:
    """What sums with this maximum were taken at, see `ntpseg.kernels.tl_utils.anchored_exp`."""
    return torch.where(top > anchors.limit, top * LOG2E.value, anchors.anchor)
