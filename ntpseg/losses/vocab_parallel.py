"""The output matrix sharded along the vocabulary over the ranks of a group, the hidden states replicated.

Each rank exponentiates its own classes. What a row needs from the others goes through five small reductions a block:
the target's logit (sum), the maximum (max) and its class (min, so that ties go to the lowest id), S (sum) and the
logits of negatives and hard tokens (sum). The hidden states' gradient is summed once, at the end; the weight's needs
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_NO_CLASS = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Shard:
    """The classes ``first <= v < first + count`` of one call's slice of the vocabulary, and how to reduce.

    `total` counts the classes of the slice over all ranks. Without a group every reduction is the identity.
    """

    first: int
    count: int
    total: int
    group: dist.ProcessGroup | None = None

    @staticmethod
    def named(name: str, first: int, count: int, total: int) -> Shard:
        """From the name of a group, "" for none; an operator's schema carries no group."""
        group = dist.distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]
        return Shard(first, count, total, group)

    @property
    def share(self) -> int:
        """Classes per rank, the same number on all of them: what sizes must follow that all ranks agree upon."""
        return self.total if self.group is None else -(-self.total // dist.get_world_size(self.group))

    def local(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each token in this shard, 0 where it is elsewhere, and whether it is here."""
        column = token - self.first
        here = (column >= 0) & (column < self.count)
        return torch.where(here, column, 0), here

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.group is not None:
            value = value.contiguous()
            dist.all_reduce(value, dist.ReduceOp.SUM, group=self.group)
        return value

    def top(self, top: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Maximum over the ranks and its class in the slice, the lowest on ties; `best` counts from this shard."""
        best = best + self.first
        if self.group is None:
            return top, best
        highest = top.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        best = torch.where(top == highest, best, _NO_CLASS)
        dist.all_reduce(best, dist.ReduceOp.MIN, group=self.group)
        return highest, torch.where(best == _NO_CLASS, 0, best)  # nowhere equal: the row is not a number


def locate(weight: Tensor, group: dist.ProcessGroup) -> tuple[int, int]:
    """First class of this rank's shard and the number of all classes; shards lie in the order of the ranks.

    Args:
        weight: ``[V_rank, D]`` or ``[k, V_rank, D]``; sizes may differ between ranks.
        group: the ranks that share the vocabulary.
    """
    own = torch.tensor([weight.shape[-2]], device=weight.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    counts = torch.cat(sizes).tolist()
    rank = dist.get_rank(group)
    return sum(counts[:rank]), sum(counts)
