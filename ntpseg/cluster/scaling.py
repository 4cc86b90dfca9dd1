"""Weak and strong scaling curves, predicted: the time of a step from 1 to 1,024 GPUs with communication counted.

Computation takes the model's operations over the assumed share (MFU) of the GPU's peak, or what was measured for a
micro-batch. Communication is counted by `ntpseg.cluster.communication` and timed by its alpha-beta model. What runs
beside forward or backward is hidden up to the assumed share `overlap`, and no longer than that computation takes; the
rest adds to the step. Left out: the optimizer's own time, loading of data, stragglers, and whether the model fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ntpseg.cluster.communication import (
    STRATEGIES,
    Collective,
    TrafficOptions,
    by_kind,
    het_exchange,
    step_traffic,
    training_collectives,
    wire_bytes,
)
from ntpseg.cluster.communication.extras import logged_gathers
from ntpseg.cluster.communication.seconds import collective_seconds
from ntpseg.cluster.communication.strategies import Strategy, ZeroSettings
from ntpseg.cluster.interconnect import Interconnect, interconnect
from ntpseg.cluster.workload import Workload
from ntpseg.utils.checks import check_choice, check_integer, check_number

# Forward's share of a micro-batch: a third, or a quarter where backward runs the layers forward once more.
_FORWARD, _FORWARD_CHECKPOINTED = 1 / 3, 1 / 4


@dataclass(frozen=True)
class ScalingOptions:
    """What the curves assume.

    Attributes:
        gpu: name of an `Interconnect`.
        strategy: see `TrafficOptions`.
        max_gpus: the last point; the others are the powers of two below it.
        mfu: share of the GPU's dense bfloat16 peak that computation reaches.
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
    mfu: float = 0.4
    micro_batch_seconds: float | None = None
    overlap: float = 0.9
    global_batch: int | None = None
    samples: int | None = None
    dtype: str = "bfloat16"
    zero: ZeroSettings = ZeroSettings()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        interconnect(self.gpu)
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
    hardware = interconnect(options.gpu)
    repeated = 4 / 3 if workload.activation_checkpointing else 1.0
    if options.micro_batch_seconds is not None:
        seconds = options.micro_batch_seconds / workload.micro_batch
    else:
        seconds = repeated * workload.flops / (hardware.peak_flops * options.mfu)
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
    hardware: Interconnect
    sequence_seconds: float

    def point(self, gpus: int, micro_batch: int, accumulation: int, sequences: int) -> ScalingPoint:
        """A point whose step is of so many `sequences` over all GPUs."""
        workload = self.workload
        traffic = self.traffic(gpus, accumulation)
        micro_seconds = micro_batch * self.sequence_seconds
        compute = micro_seconds * accumulation
        epoch, share = self.exchange(gpus, sequences)
        total, exposed = self.communication(traffic, gpus, micro_seconds)
        epoch_seconds = sum(collective_seconds(each, gpus, self.hardware) for each in epoch) * share
        total, exposed = total + epoch_seconds, exposed + epoch_seconds
        step = compute + exposed
        rate = sequences * workload.tokens / step
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
            efficiency=rate * self.sequence_seconds / (workload.tokens * gpus),
            communication_share=exposed / step,
            wire_bytes=sent,
            traffic=by_kind(traffic),
        )

    def traffic(self, gpus: int, accumulation: int) -> list[Collective]:
        """Of a step, with what the trainer sends."""
        if gpus == 1:
            return []
        workload, options, shape = self.workload, self.options, self.workload.shape
        divided = TrafficOptions(
            strategy=options.strategy,
            ranks=gpus,
            accumulation=accumulation,
            dtype=options.dtype,
            activation_checkpointing=workload.activation_checkpointing,
            zero=options.zero,
        )
        small = [*training_collectives(shape.heads, shape.terms), *logged_gathers(gpus)]
        return [*step_traffic(shape, divided), *small]

    def exchange(self, gpus: int, sequences: int) -> tuple[list[Collective], float]:
        """Of hard tokens at the end of an epoch, and the share of it that falls on a step."""
        samples, entries = self.options.samples, self.workload.hard_tokens
        if samples is None or not entries:
            return [], 0.0
        found = het_exchange((0, -(-samples // gpus)), entries, gpus)
        return found, min(sequences / samples, 1.0)

    def communication(self, traffic: Iterable[Collective], gpus: int, micro_seconds: float) -> tuple[float, float]:
        """Seconds of all collectives, and of those that nothing hides."""
        checkpointed = self.workload.activation_checkpointing
        forward = _FORWARD_CHECKPOINTED if checkpointed else _FORWARD
        beside = {"forward": forward, "backward": 1.0 - forward, "step": 0.0}
        spent: dict[tuple[str, int], float] = defaultdict(float)
        for each in traffic:
            spent[each.phase, each.micro_steps] += collective_seconds(each, gpus, self.hardware)
        total = sum(spent.values())
        hidden = sum(
            min(self.options.overlap * seconds, micro_steps * micro_seconds * beside[phase])
            for (phase, micro_steps), seconds in spent.items()
        )
        return total, total - hidden
