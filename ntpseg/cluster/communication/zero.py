"""DeepSpeed's ZeRO-1 and ZeRO-2, by the rules of ``stage_1_and_2.py`` (read and measured in 0.19.8).

The papers' stage 2 reduce-scatters; DeepSpeed's default (``use_multi_rank_bucket_allreduce``) all-reduces each bucket
and keeps a rank's part. So both stages send what DDP sends, and the updated weights besides.
"""

from __future__ import annotations

from collections.abc import Iterator

from ntpseg.cluster.communication.collective import Collective, grouped
from ntpseg.cluster.communication.parameters import ModelShape, Parameter

# Elements: the start of each rank's part is aligned to so many times the ranks (nccl_start_alignment_factor).
_ALIGNMENT = 2


def zero12(
    shape: ModelShape, stage: int, ranks: int, accumulation: int, element_bytes: int, bucket: int
) -> list[Collective]:
    """Gradients all-reduced in buckets, weights of each optimizer group all-gathered after the step.

    Stage 1 reduces once, after the last backward, in the order of the optimizer's groups; stage 2 in each micro-batch,
    as backward goes.

    Args:
        shape: the model's parameters.
        stage: 1 or 2.
        ranks: n.
        accumulation: micro-batches of a step.
        element_bytes: of weights and gradients.
        bucket: ``reduce_bucket_size``, elements.
    """
    groups = shape.optimizer_groups
    parts: dict[Parameter, list[int]] = {}
    gathered = []
    for group in groups:
        whole = _aligned(sum(p.numel for p in group), ranks)
        gathered.append(whole * element_bytes)
        parts |= _parts(group, whole // ranks)
    order = [p for group in groups for p in group] if stage == 1 else shape.gradient_order
    payloads = [size * element_bytes for run in _buckets(order, bucket) for size in _calls(run, parts, bucket)]
    times, phase = (1, "step") if stage == 1 else (accumulation, "backward")
    found = grouped("all_reduce", payloads, phase, "gradients", times=times, micro_steps=times)  # type: ignore[arg-type]
    if element_bytes < 4:
        found.append(Collective("all_reduce", 1, 1, "step", "overflow of the gradient"))
    return [
        *found,
        Collective("all_reduce", 4, len(groups), "step", "norm of the gradient, by group"),
        *grouped("all_gather", gathered, "step", "updated weights"),
    ]


def _aligned(numel: int, ranks: int) -> int:
    step = _ALIGNMENT * ranks
    return -(-numel // step) * step


def _parts(group: tuple[Parameter, ...], part: int) -> dict[Parameter, list[int]]:
    """Elements of each parameter in each rank's part of the flat group, where it has any."""
    found: dict[Parameter, list[int]] = {}
    start = 0
    for parameter in group:
        stop, sizes = start + parameter.numel, []
        while start < stop:
            end = min(stop, (start // part + 1) * part)
            sizes.append(end - start)
            start = end
        found[parameter] = sizes
    return found


def _buckets(order: tuple[Parameter, ...] | list[Parameter], bucket: int) -> Iterator[list[Parameter]]:
    """Parameters that are reduced together; one larger than the bucket goes alone."""
    run: list[Parameter] = []
    filled = 0
    for parameter in order:
        if run and filled + parameter.numel > bucket:
            yield run
            run, filled = [], 0
        run.append(parameter)
        filled += parameter.numel
    if run:
        yield run


def _calls(run: list[Parameter], parts: dict[Parameter, list[int]], bucket: int) -> Iterator[int]:
    """Elements of each all-reduce of a bucket: its slices, one for each rank's part, until they exceed the bucket."""
    filled = 0
    for size in (size for parameter in run for size in parts[parameter]):
        filled += size
        if filled > bucket:
            yield filled
            filled = 0
    if filled:
        yield filled
