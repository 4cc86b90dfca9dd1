"""Time of a step's collectives, and how much of it the computation hides: the one place where a plan asks for it."""

from __future__ import annotations

from ntpseg.cluster.planning.machines import Gpu
from ntpseg.cluster.planning.numerics import Numerics
from ntpseg.cluster.planning.workload import Workload

# What collectives reach of a link's rate, and their start; predicted, not measured here.
_LINK_SHARE = 0.8
_LATENCY = 20e-6
# Weights that DeepSpeed keeps gathered for backward need no second all-gather.
_MAX_LIVE = 10**9


def step_bytes(work: Workload, numerics: Numerics, *, accumulation: int) -> float:
    """Bytes that a rank passes on in a step, for many ranks: ZeRO (arXiv 1910.02054, section 7), by micro-batches.

    An all-gather or a reduce-scatter of M bytes passes on M, an all-reduce 2 M. DDP reduces once a step, and so does
    ZeRO-1, which then gathers weights; DeepSpeed's ZeRO-2 reduces buckets by all-reduce in every micro-batch; ZeRO-3
    and FSDP gather in forward and backward and scatter gradients in every micro-batch.
    """
    total, size = work.parameters.total, numerics.weight_bytes
    if numerics.sharding == "one":
        return 0.0
    if numerics.sharding == "ddp":
        return 2.0 * 4 * total
    if numerics.sharding == "zero1":
        return 3.0 * size * total
    if numerics.sharding == "zero2":
        return size * total * (2.0 * accumulation + 1)
    if numerics.sharding == "zero3":
        gathers = 1 if total <= _MAX_LIVE else 2
        return size * total * float(gathers + 1) * accumulation
    inside = work.parameters.layer * work.parameters.layers
    return numerics.product_bytes * float(total + inside + total) * accumulation


def link_bandwidth(gpu: Gpu, ranks: int) -> float:
    """Bytes/s that a ring over all ranks gets: the links within a machine, or all network cards of one."""
    if ranks <= gpu.gpus_per_node:
        return gpu.node_bandwidth
    return min(gpu.node_bandwidth, gpu.network_bandwidth * gpu.gpus_per_node)


def step_seconds(work: Workload, numerics: Numerics, gpu: Gpu, ranks: int, *, accumulation: int) -> float:
    """Seconds of a step's collectives by themselves (bandwidth-optimal rings; Patarasuk and Yuan 2009)."""
    if ranks == 1:
        return 0.0
    moved = step_bytes(work, numerics, accumulation=accumulation) * (ranks - 1) / ranks
    starts = (2 * work.layers if numerics.sharding in ("zero3", "fsdp2") else 1) * accumulation
    return moved / (link_bandwidth(gpu, ranks) * _LINK_SHARE) + starts * _LATENCY * ranks.bit_length()


def exposed_seconds(collectives: float, computation: float) -> float:
    """Of the collectives, what is not hidden behind the computation that they run beside."""
    return max(0.0, collectives - computation)
