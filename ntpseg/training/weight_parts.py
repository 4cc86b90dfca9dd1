"""The part of each weight that a rank holds: all of it, ZeRO-3's partition or FSDP2's shard.

Each is a contiguous range of the flattened weight, so that what one division saved another can read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Part(NamedTuple):
    """What a rank holds of a trained weight.

    Attributes:
        name: of the weight.
        tensor: its entries, detached, which share the weight's memory.
        start: of the first of them in the flattened weight.
        size: entries of the whole weight.
    """

    name: str
    tensor: Tensor
    start: int
    size: int


def trained_parts(model: nn.Module) -> list[Part]:
    """This rank's part of every weight that is trained.

    Raises:
        ValueError: DeepSpeed keeps the weights on a disk, or a weight is divided otherwise than along its first
            dimension.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After an evaluation the modules that are gathered last still are.
            module.reshard()
    return [_part(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _part(name: str, weight: Any) -> Part:
    if hasattr(weight, "ds_id"):
        tensor = weight.ds_tensor
        if tensor.numel() < tensor.ds_numel:
            raise ValueError(f"offload_param must keep the weights in memory to average them, got a disk for {name!r}")
        start = tensor.ds_numel * dist.get_rank(weight.ds_process_group)
        held = min(max(weight.ds_numel - start, 0), tensor.ds_numel)
        return Part(name, tensor.narrow(0, 0, held), start, weight.ds_numel)
    weight = weight.detach()
    if not isinstance(weight, DTensor):
        return Part(name, weight, 0, weight.numel())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    if tuple(shape[1:]) != tuple(weight.shape[1:]) and torch.Size(shape).numel():
        raise ValueError(f"weights must be divided along their first dimension, got {weight.placements} for {name!r}")
    width = torch.Size(weight.shape[1:]).numel()
    return Part(name, weight.to_local(), offset[0] * width if offset else 0, weight.numel())


@contextmanager
def changed_parts(model: nn.Module) -> Iterator[list[Part]]:
    """`trained_parts` to write to; afterwards no gathered copy has the former values. All ranks must call it alike."""
    yield trained_parts(model)
    gathered = [weight for weight in model.parameters() if _is_gathered(weight)]
    if gathered:
        first: Any = gathered[0]
        first.partition(gathered)
        kept = [weight for weight in gathered if getattr(weight, "ds_persist", False)]
        if kept:
            first.all_gather(kept)


def _is_gathered(weight: Any) -> bool:
    """Whether ZeRO-3 has a weight whole in memory: small ones always."""
    return hasattr(weight, "ds_id") and weight.ds_status.name == "AVAILABLE" and not weight.ds_active_sub_modules
