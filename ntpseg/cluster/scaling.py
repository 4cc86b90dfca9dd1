"""Weak and strong scaling curves, predicted: the time of a step from 1 to 1,024 GPUs with communication counted.

Computation takes the model's operations over the assumed share (MFU) of the GPU's peak, or what was measured for a
micro-batch. Communication is counted and timed by `ntpseg.cluster.communication`; what computation does not hide adds
to the step. Left out: the optimizer's own time, loading of data, stragglers, and whether the model fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ntpseg.cluster.communication import (
    STRATEGIES,
    Collective,
    TrafficOptions,
    by_kind,
    het_exchange,
    trainer_traffic,
    wire_bytes,
)
from ntpseg.cluster.communication.seconds import OVERLAP, step_seconds
from ntpseg.cluster.communication.strategies import Strategy, ZeroSettings
from ntpseg.cluster.machines import Gpu, gpu
from ntpseg.cluster.planning.compute_time import PREDICTED_MFU, PRODUCT_SHARE
from ntpseg.cluster.workload import Workload
from ntpseg.utils.checks import check_choice, check_integer, check_number


@dataclass(frozen=True)
class ScalingOptions:
    """What the curves assume.

    Attributes:
        gpu: name of a `Gpu`.
        strategy: see `TrafficOptions`.
        max_gpus: the last point; the others are the powers of two below it.
        mfu: share of the GPU's dense bfloat16 peak that computation reaches; by default what plans predict.
        micro_batch_seconds: measured seconds of one micro-batch, forward and backward; None: from operations and `mfu`.
        overlap: share of the communication beside forward or backward that computation can hide. Stage 1 of ZeRO
            reduces after backward: nothing of it is hidden.
        global_batch: sequences of a step in strong scaling; None: those of the configuration on 64 GPUs, or
            `max_gpus` where that is more.
        samples: of the data set: the exchange of hard tokens at the end of an epoch is spread over its steps. None:
            it is left out.
        dtype: see `TrafficOptions`.
        zero: DeepSpeed's settings.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """

    gpu: str = "h100"
    strategy: Strategy = "zero3"
    max_gpus: int = 1024
    mfu: float = PRODUCT_SHARE * PREDICTED_MFU
    micro_batch_seconds: float | None = None
    overlap: float = OVERLAP
    global_batch: int | None = None
    samples: int | None = None
    dtype: str = "bfloat16"
    zero: ZeroSettings = ZeroSettings()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        gpu(self.gpu)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_integer("max_gpus", self.max_gpus, 1)
        check_number("mfu", self.mfu, above=0.0, maximum=1.0)
        check_number("overlap", self.overlap, 0.0, 1.0)
        if self.micro_batch_seconds is not None:
            check_number("micro_batch_seconds", self.micro_batch_seconds, above=0.0)
        for name in ("global_batch", "samples"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)


@dataclass(frozen=True)
class ScalingPoint:
    """One number of GPUs.

    Attributes:
        gpus: n.
        micro_batch, accumulation: of each GPU.
        step_seconds: of an optimizer step.
        compute_seconds: forward and backward of all its micro-batches.
        communication_seconds: of all collectives, hidden ones included.
        exposed_seconds: those of them that computation does not hide.
        tokens_per_second: of all GPUs.
        efficiency: tokens/s over n times those of one GPU.
        communication_share: exposed_seconds over step_seconds.
        wire_bytes: that each GPU sends in a step.
        traffic: calls and payload by collective.
    """

    gpus: int
    micro_batch: int
    accumulation: int
    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    exposed_seconds: float
    tokens_per_second: float
    efficiency: float
    communication_share: float
    wire_bytes: float
    traffic: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Curves:
    """Both curves of one strategy.

    Attributes:
        options: what they assume; `global_batch` is filled in.
        weak: the batch of a GPU stays.
        strong: the batch of all GPUs stays; ends where a GPU would have no sequence.
        sequence_seconds: of one sequence, forward and backward (forward twice with activation checkpointing).
    """

    options: ScalingOptions
    weak: tuple[ScalingPoint, ...]
    strong: tuple[ScalingPoint, ...]
    sequence_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"predicted": True, **asdict(self)}


def scaling_curves(workload: Workload, options: ScalingOptions) -> Curves:
    """Predict both curves.

    Args:
        workload: model and sequences.
        options: the assumptions.
    """
    hardware = gpu(options.gpu)
    if options.micro_batch_seconds is not None:
        seconds = options.micro_batch_seconds / workload.micro_batch
    else:
        operations = workload.step_flops(1) + (workload.recomputed_flops(1) if workload.checkpointing else 0.0)
        seconds = operations / (hardware.bf16_flops * options.mfu)
    own_batch = workload.micro_batch * workload.accumulation
    if options.global_batch is None:
        options = replace(options, global_batch=max(64 * own_batch, options.max_gpus))
    assert options.global_batch is not None
    numbers = gpu_numbers(options.max_gpus)
    make = _Curve(workload, options, hardware, seconds)
    weak = [make.point(n, workload.micro_batch, workload.accumulation, own_batch * n) for n in numbers]
    strong = []
    for n in numbers:
        if n > options.global_batch:
            break
        each = -(-options.global_batch // n)
        micro = min(workload.micro_batch, each)
        strong.append(make.point(n, micro, -(-each // micro), options.global_batch))
    return Curves(options, tuple(weak), tuple(strong), seconds)


def gpu_numbers(largest: int) -> list[int]:
    """1, 2, 4 ... up to `largest`, which is the last whatever it is."""
    return [*(1 << i for i in range((largest - 1).bit_length())), largest]


@dataclass(frozen=True)
class _Curve:
    """What the points have in common; see `scaling_curves`."""

    workload: Workload
    options: ScalingOptions
    hardware: Gpu
    sequence_seconds: float

    def point(self, gpus: int, micro_batch: int, accumulation: int, sequences: int) -> ScalingPoint:
        """A point whose step is of so many `sequences` over all GPUs."""
        workload = self.workload
        options = TrafficOptions(
            strategy=self.options.strategy,
            ranks=gpus,
            accumulation=accumulation,
            dtype=self.options.dtype,
            activation_checkpointing=workload.checkpointing,
            zero=self.options.zero,
        )
        traffic = trainer_traffic(workload.shape, options)
        micro_seconds = micro_batch * self.sequence_seconds
        compute = micro_seconds * accumulation
        total, exposed = step_seconds(
            traffic,
            gpus,
            self.hardware,
            micro_seconds,
            checkpointing=workload.checkpointing,
            overlap=self.options.overlap,
        )
        epoch, share = self.exchange(gpus, sequences)
        epoch_seconds = step_seconds(epoch, gpus, self.hardware, 0.0).total * share
        total, exposed = total + epoch_seconds, exposed + epoch_seconds
        step = compute + exposed
        rate = sequences * workload.mean_tokens / step
        sent = sum(each.calls * wire_bytes(each.kind, each.payload, gpus) for each in traffic)
        sent += share * sum(each.calls * wire_bytes(each.kind, each.payload, gpus) for each in epoch)
        return ScalingPoint(
            gpus=gpus,
            micro_batch=micro_batch,
            accumulation=accumulation,
            step_seconds=step,
            compute_seconds=compute,
            communication_seconds=total,
            exposed_seconds=exposed,
            tokens_per_second=rate,
            efficiency=rate * self.sequence_seconds / (workload.mean_tokens * gpus),
            communication_share=exposed / step,
            wire_bytes=sent,
            traffic=by_kind(traffic),
        )

    def exchange(self, gpus: int, sequences: int) -> tuple[list[Collective], float]:
        """Of hard tokens at the end of an epoch, and the share of it that falls on a step."""
        samples, entries = self.options.samples, self.workload.hard_tokens
        if samples is None or not entries:
            return [], 0.0
        found = het_exchange((0, -(-samples // gpus)), entries, gpus)
        return found, min(sequences / samples, 1.0)
