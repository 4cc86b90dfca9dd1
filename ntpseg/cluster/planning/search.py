"""Choosing how a run is cut: of every sharding, micro-batch and checkpointing that fits, the quickest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ntpseg.cluster.communication import TrafficOptions, trainer_traffic
from ntpseg.cluster.communication.seconds import StepSeconds, step_seconds
from ntpseg.cluster.machines import GPUS, Gpu
from ntpseg.cluster.planning.compute_time import PREDICTED_MFU, ComputeTime, compute_time
from ntpseg.cluster.planning.memory import Batch, MemoryPlan, memory_plan
from ntpseg.cluster.planning.numerics import PRECISIONS, SHARDINGS, Numerics
from ntpseg.cluster.workload import Workload
from ntpseg.utils.checks import check_choice, check_integer, check_number

# auto: all of these; FSDP is planned where it is asked for, DeepSpeed being what `ntpseg train --deepspeed` starts.
_AUTO = ("one", "ddp", "zero1", "zero2", "zero3")
ZERO_CHOICES = ("auto", "none", "1", "2", "3", "fsdp2")
# Of the memory, what is left free: the plan's own error (docs/cluster.md), and fragments of the caching allocator.
RESERVE = 0.1
_MOST_GPUS = 4096


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is asked for.

    Attributes:
        gpus: how many.
        zero: one of `ZERO_CHOICES`; none: DDP (or one process).
        samples: sequences of a micro-batch; None: what is quickest.
        checkpointing: of activations; None: where it is needed.
        offload: of the optimizer; None: where nothing fits without.
        precision: bfloat16 or float32.
        sequences_per_step: of all ranks together; None: the configuration's batch x accumulation on each GPU.
        mfu: see `compute_time`.
        price: of a GPU and hour; None: unknown.

    Raises:
        ValueError: a value out of range.
    """

    gpus: int = 1
    zero: str = "auto"
    samples: int | None = None
    checkpointing: bool | None = None
    offload: bool | None = None
    precision: str = "bfloat16"
    sequences_per_step: int | None = None
    mfu: float = PREDICTED_MFU
    price: float | None = None

    def __post_init__(self) -> None:
        check_integer("gpus", self.gpus, 1)
        check_choice("zero", self.zero, ZERO_CHOICES)
        for name in ("samples", "sequences_per_step"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_choice("precision", self.precision, PRECISIONS)
        check_number("mfu", self.mfu, 0, 1)
        if self.price is not None:
            check_number("price", self.price, 0)
        if self.offload and self.zero in ("none", "1", "fsdp2"):
            raise ValueError(f"zero must be auto, 2 or 3 with offload, got {self.zero!r}")


@dataclass(frozen=True)
class Candidate:
    """One way to run it.

    Attributes:
        numerics, batch: what is chosen.
        memory: of a rank.
        compute: seconds of a step.
        collectives: seconds of a step's communication: by itself, and what computation does not hide of it.
        seconds: of a step.
    """

    numerics: Numerics
    batch: Batch
    memory: MemoryPlan
    compute: ComputeTime
    collectives: StepSeconds
    seconds: float


def usable_memory(gpu: Gpu) -> float:
    """Bytes of a GPU without the reserve for fragments."""
    return gpu.memory * (1 - RESERVE)


def fits(candidate: Candidate, gpu: Gpu) -> bool:
    """Whether the memory is enough."""
    return candidate.memory.total <= usable_memory(gpu)


def candidates(work: Workload, gpu: Gpu, options: PlanOptions, *, offload: bool) -> Iterator[Candidate]:
    """Every way to run it that the options leave open, whether it fits or not."""
    per_gpu = _per_gpu(work, options)
    samples = [options.samples] if options.samples else _divisors(per_gpu)
    checkpointing = (False, True) if options.checkpointing is None else (options.checkpointing,)
    for sharding, size, again in product(_shardings(options, offload), samples, checkpointing):
        numerics = Numerics(sharding, options.precision, "cuda", "optimizer" if offload else "none")
        yield evaluate(work, gpu, options, numerics, Batch(size, max(1, -(-per_gpu // size)), again))


def evaluate(work: Workload, gpu: Gpu, options: PlanOptions, numerics: Numerics, batch: Batch) -> Candidate:
    """Memory and time of one way to run it."""
    memory = memory_plan(work, numerics, options.gpus, batch)
    compute = compute_time(work, numerics, gpu, options.gpus, batch, options.mfu)
    traffic = TrafficOptions(
        strategy="ddp" if numerics.sharding == "one" else numerics.sharding,  # type: ignore[arg-type]  # checked
        ranks=options.gpus,
        accumulation=batch.accumulation,
        dtype=numerics.precision,
        activation_checkpointing=batch.checkpointing,
    )
    collectives = step_seconds(
        trainer_traffic(work.shape, traffic),
        options.gpus,
        gpu,
        (compute.model + compute.recomputation) / batch.accumulation,
        checkpointing=batch.checkpointing,
    )
    return Candidate(numerics, batch, memory, compute, collectives, compute.total + collectives.exposed)


def choose(work: Workload, gpu: Gpu, options: PlanOptions) -> Candidate:
    """The quickest that fits; with offload only where nothing fits without; the smallest where nothing fits at all."""
    tried: list[Candidate] = []
    for offload in (False, True) if options.offload is None else (options.offload,):
        if offload and not _shardings(options, offload):
            continue
        found = list(candidates(work, gpu, options, offload=offload))
        fitting = [c for c in found if fits(c, gpu)]
        if fitting:
            best = min(c.seconds for c in fitting)
            # What is as quick within a hundredth may as well divide less and keep its activations.
            return min((c for c in fitting if c.seconds <= 1.01 * best), key=_preference)
        tried += found
    return min(tried, key=lambda c: c.memory.total)


def remedies(work: Workload, gpu: Gpu, options: PlanOptions) -> list[str]:
    """What would make it fit, each by itself; several changes together where none does; empty where nothing does."""
    changes: list[tuple[str, PlanOptions]] = []
    if options.checkpointing is False:
        changes.append(("activation checkpointing", replace(options, checkpointing=None)))
    if options.samples is not None and options.samples > 1:
        changes.append(("a smaller micro-batch", replace(options, samples=None)))
    if options.zero != "auto":
        changes.append(("another ZeRO stage", replace(options, zero="auto")))
    if options.offload is False:
        stage = options.zero if options.zero in ("auto", "2", "3") else "auto"
        changes.append(("optimizer offload", replace(options, offload=True, zero=stage)))
    found = [f"{text}: {how}" for text, changed in changes if (how := _if_it_fits(work, gpu, changed))]
    if (more := more_gpus(work, gpu, options)) is not None:
        found.append(f"{more[0]} GPUs: {describe(more[1], gpu)}")
    for other in sorted((g for g in GPUS.values() if g.memory > gpu.memory), key=lambda g: g.memory):
        if how := _if_it_fits(work, other, options):
            found.append(f"{other.name}: {how}")
            break
    if found:
        return found
    free = replace(options, checkpointing=None, samples=None, zero="auto", offload=None)
    if how := _if_it_fits(work, gpu, free):
        return [f"several changes together: {how}"]
    more = more_gpus(work, gpu, free)
    return [] if more is None else [f"{more[0]} GPUs and free choice of the rest: {describe(more[1], gpu)}"]


def _if_it_fits(work: Workload, gpu: Gpu, options: PlanOptions) -> str | None:
    choice = choose(work, gpu, options)
    return describe(choice, gpu) if fits(choice, gpu) else None


def more_gpus(work: Workload, gpu: Gpu, options: PlanOptions) -> tuple[int, Candidate] | None:
    """The least power of two times the GPUs that is enough, with the same batch per step where that was given."""
    count = options.gpus * 2
    while count <= _MOST_GPUS and (options.sequences_per_step or 0) % count == 0:
        choice = choose(work, gpu, replace(options, gpus=count))
        if fits(choice, gpu):
            return count, choice
        count *= 2
    return None


def describe(candidate: Candidate, gpu: Gpu) -> str:
    """A candidate in some words."""
    batch = candidate.batch
    words = [candidate.numerics.sharding, f"micro-batch {batch.samples}"]
    words += ["checkpointing"] * batch.checkpointing
    words += ["optimizer offload"] * (candidate.numerics.offload != "none")
    return ", ".join(words) + f", {candidate.memory.total / 2**30:.1f} of {usable_memory(gpu) / 2**30:.1f} GiB"


def _preference(candidate: Candidate) -> tuple[int, bool, int]:
    order = SHARDINGS.index(candidate.numerics.sharding)
    return order, candidate.batch.checkpointing, -candidate.batch.samples


def _shardings(options: PlanOptions, offload: bool) -> list[str]:
    alone = options.gpus == 1
    if options.zero == "auto":
        names = [name for name in _AUTO if name != ("ddp" if alone else "one")]
    elif options.zero == "none":
        names = ["one" if alone else "ddp"]
    else:
        names = [options.zero if options.zero == "fsdp2" else f"zero{options.zero}"]
    return [name for name in names if not offload or name in ("zero2", "zero3")]


def _per_gpu(work: Workload, options: PlanOptions) -> int:
    """Sequences of a step on each GPU."""
    if options.sequences_per_step is None:
        per_gpu = work.micro_batch * work.accumulation
        return max(per_gpu, options.samples or 1)
    if options.sequences_per_step % options.gpus:
        raise ValueError(f"batch must be a multiple of the GPUs, {options.gpus}, got {options.sequences_per_step}")
    return options.sequences_per_step // options.gpus


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
