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
    """One rank's part of the classes of a call, and how to reduce over the ranks.

    Attributes:
        start, count: the classes ``start <= v < start + count`` of the call's slice of the vocabulary are here.
        total: classes of the slice over all ranks.
        group: the ranks; None: this one alone, and every reduction is the identity.
    """

    start: int
    count: int
    total: int
    group: dist.ProcessGroup | None = None

    @staticmethod
    def from_group_name(name: str, start: int, count: int, total: int) -> Shard:
        """From the name of a group, "" for none; an operator's schema carries no group."""
        group = dist.distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]  # a GroupName is a str
        return Shard(start, count, total, group)

    @property
    def classes_per_rank(self) -> int:
        """Classes per rank, the same number on all of them: what sizes must follow that all ranks agree upon."""
        return self.total if self.group is None else -(-self.total // dist.get_world_size(self.group))

    def local_index(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each token in this shard, 0 where it is elsewhere, and whether it is here."""
        column = token - self.start
        here = (column >= 0) & (column < self.count)
        return torch.where(here, column, 0), here

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.group is not None:
            value = value.contiguous()
            dist.all_reduce(value, dist.ReduceOp.SUM, group=self.group)
        return value

    def all_reduce_max(self, row_max: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
        """Maximum over the ranks and its class in the slice, the lowest on ties; `argmax` counts from this shard."""
        argmax = argmax + self.start
        if self.group is None:
            return row_max, argmax
        global_max = row_max.clone()
        dist.all_reduce(global_max, dist.ReduceOp.MAX, group=self.group)
        argmax = torch.where(row_max == global_max, argmax, _NO_CLASS)
        dist.all_reduce(argmax, dist.ReduceOp.MIN, group=self.group)
        return global_max, torch.where(argmax == _NO_CLASS, 0, argmax)  # an all-NaN row


def local_shards(
    weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None, hidden: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor | None, dist.ProcessGroup | None]:
    """A weight that is a DTensor as this rank's shard and the group that it is sharded over; others as they are.

    Raises:
        ValueError: the DTensor is neither replicated nor sharded along the vocabulary over one mesh dimension, `group`
            is given as well, the bias is not placed as the weight is, or the ranks have different hidden states or
            labels (a weight that FSDP shards, used outside of its module's forward).
    """
    if torch.compiler.is_compiling() or not dist.is_available() or not dist.is_initialized():
        return weight, bias, group
    from torch.distributed.tensor import DTensor, Shard

    if any(isinstance(tensor, DTensor) for tensor in (hidden, labels)):
        raise ValueError("hidden and labels must be plain tensors, got DTensors: full_tensor()")
    if not isinstance(weight, DTensor):
        return weight, bias, group
    if group is not None:
        raise ValueError("group must be None with a DTensor weight, which brings its own, got both")
    if bias is not None and (not isinstance(bias, DTensor) or bias.placements != weight.placements):
        raise ValueError("bias must be a DTensor placed as the weight is, got another placement")
    local_bias = None if bias is None else bias.to_local()
    sharded = [(dim, place) for dim, place in enumerate(weight.placements) if not place.is_replicate()]
    if not sharded:
        return weight.to_local(), local_bias, None
    if len(sharded) > 1 or sharded[0][1] != Shard(weight.dim() - 2):
        raise ValueError(
            "weight must be replicated or sharded along the vocabulary over one mesh dimension, got "
            f"{weight.placements}: use weight.full_tensor()"
        )
    group = weight.device_mesh.get_group(sharded[0][0])
    own = torch.stack([hidden.detach().double().sum(), labels.double().sum()])
    other = own.clone()
    dist.broadcast(other, dist.get_global_rank(group, 0), group=group)
    same = torch.equal(own.nan_to_num(), other.nan_to_num())  # a NaN is equal to nothing, itself included
    everywhere = torch.tensor([int(same)], device=own.device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=group)
    if not int(everywhere):
        raise ValueError(
            "hidden and labels must be the same on all ranks that share the vocabulary, got different ones: is this "
            "weight sharded by FSDP? Then compute the loss inside its module's forward, or use weight.full_tensor()"
        )
    return weight.to_local(), local_bias, group


def shard_offset(weight: Tensor, group: dist.ProcessGroup) -> tuple[int, int]:
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
