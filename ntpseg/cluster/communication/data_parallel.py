"""PyTorch's own: DistributedDataParallel and FSDP2's ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterable

from ntpseg.cluster.communication.collective import Collective, grouped
from ntpseg.cluster.communication.parameters import ModelShape, Parameter

# Of torch.nn.parallel.DistributedDataParallel: bytes of the first bucket, and of all others (bucket_cap_mb).
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20
_EMBEDDING, _HEADS = "backbone.embed_tokens", "heads"


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
    """Units of ``fully_shard``: each decoder layer, the embedding, the heads, and all else as the root.

    In every micro-batch a unit is gathered for forward and again for backward; heads and root, with which backward
    begins, stay gathered (``reshard_after_forward=False``), as does an embedding that is tied to the heads. Then each
    unit's gradients are reduce-scattered. Activation checkpointing changes nothing: layers run again while they are
    gathered for backward.
    """
    freed, kept = _units(shape)
    again = [_padded(unit, ranks) * element_bytes for unit in freed]
    once = [_padded(unit, ranks) * element_bytes for unit in kept]
    gradients = [_padded([p for p in unit if p.trainable], ranks) * element_bytes for unit in (*freed, *kept)]
    calls = {"times": accumulation, "micro_steps": accumulation}
    norms = len([p for p in shape.parameters if p.trainable])
    return [
        *grouped("all_gather", [*again, *once], "forward", "weights for forward", **calls),
        *grouped("all_gather", again, "backward", "weights for backward", **calls),
        *grouped("reduce_scatter", gradients, "backward", "gradients", **calls),
        Collective("all_reduce", 4 * norms, 1, "step", "norm of the gradient"),
    ]


def _units(shape: ModelShape) -> tuple[list[list[Parameter]], list[list[Parameter]]]:
    """Parameters that are gathered together: of units that are freed after forward, and of those that are not."""
    places: dict[str, list[Parameter]] = {}
    seen: set[Parameter] = set()
    names = {module.name: module for module in shape.modules}
    embedding, heads = names.get(_EMBEDDING), names.get(_HEADS)
    tied = embedding and heads and set(embedding.parameters) & set(heads.parameters)
    for module in shape.modules:
        place = "root" if module.layer is None else f"layer {module.layer}"
        if module.name in (_EMBEDDING, _HEADS):
            place = _HEADS if tied else module.name
        places.setdefault(place, []).extend(p for p in module.parameters if p not in seen)
        seen.update(module.parameters)
    kept = [places[place] for place in (_HEADS, "root") if places.get(place)]
    return [unit for place, unit in places.items() if place not in (_HEADS, "root") and unit], kept


def _padded(parameters: Iterable[Parameter], ranks: int) -> int:
    """Elements of parameters whose first dimension is divided over the ranks, rounded up."""
    return sum(-(-p.shape[0] // ranks) * ranks * (p.numel // max(p.shape[0], 1)) for p in parameters)
