"""PyTorch's own: DistributedDataParallel and FSDP2's ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ntpseg.cluster.communication.collective import Collective, grouped
from ntpseg.cluster.communication.parameters import ModelShape, Parameter

# Of torch.nn.parallel.DistributedDataParallel: bytes of the first bucket, and of all others (bucket_cap_mb).
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20


def ddp(shape: ModelShape, gradient_bytes: int) -> list[Collective]:
    """Gradients in buckets, all-reduced in the last micro-batch's backward; buffers sent before its forward.

    Buckets are those that the reducer forms anew after its first step, in the order in which gradients came: one is
    closed by the parameter with which it reaches its size.
    """
    buckets: list[int] = []
    filled = 0
    for parameter in shape.gradient_order:
        filled += parameter.numel * gradient_bytes
        if filled >= (_BUCKET if buckets else _FIRST_BUCKET):
            buckets.append(filled)
            filled = 0
    return [
        *grouped("broadcast", shape.buffer_bytes, "step", "buffers"),
        *grouped("all_reduce", [*buckets, filled], "backward", "gradients"),
    ]


def fsdp2(shape: ModelShape, ranks: int, accumulation: int, element_bytes: int) -> list[Collective]:
    """Each decoder layer is a unit, and all else is the root, as ``fully_shard(layer)``, ``fully_shard(model)`` make.

    In every micro-batch a unit is gathered for forward and again for backward, the root once, since it stays; then each
    unit's gradients are reduce-scattered. Activation checkpointing changes nothing: layers run again while they are
    gathered for backward.
    """
    layers: dict[int, list[Parameter]] = {}
    for module in shape.modules:
        if module.layer is not None:
            layers.setdefault(module.layer, []).extend(module.parameters)
    inside = {p for parameters in layers.values() for p in parameters}
    root = [p for p in shape.parameters if p not in inside]
    units = [_padded(parameters, ranks) * element_bytes for parameters in layers.values()]
    whole = _padded(root, ranks) * element_bytes
    gradients = [_padded([p for p in unit if p.trainable], ranks) for unit in (*layers.values(), root)]
    calls = {"times": accumulation, "micro_steps": accumulation}
    norms = len([p for p in shape.parameters if p.trainable])
    return [
        *grouped("all_gather", [whole, *units], "forward", "weights for forward", **calls),
        *grouped("all_gather", units, "backward", "weights for backward", **calls),
        *grouped("reduce_scatter", [n * element_bytes for n in gradients], "backward", "gradients", **calls),
        Collective("all_reduce", 4 * norms, 1, "step", "norm of the gradient"),
    ]


def _padded(parameters: Iterable[Parameter] | Sequence[Parameter], ranks: int) -> int:
    """Elements of parameters whose first dimension is divided over the ranks, rounded up."""
    return sum(-(-p.shape[0] // ranks) * ranks * (p.numel // max(p.shape[0], 1)) for p in parameters)
