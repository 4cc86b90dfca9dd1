"""`step_traffic`: the collectives of one optimizer step under each way to divide the work over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from ntpseg.cluster.communication import data_parallel, zero, zero3
from ntpseg.cluster.communication.collective import Collective
from ntpseg.cluster.communication.extras import logged_gathers, training_collectives
from ntpseg.cluster.communication.parameters import ModelShape
from ntpseg.utils.checks import check_choice, check_integer

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ZeroSettings:
    """Fields of DeepSpeed's ``zero_optimization`` that decide what is sent, in elements; None: what "auto" becomes.

    "auto" is Hugging Face's (``transformers.integrations.deepspeed``): D^2, 0.9 D^2 and 10 D of a hidden size D.
    """

    reduce_bucket_size: int | None = None
    stage3_prefetch_bucket_size: int | None = None
    stage3_param_persistence_threshold: int | None = None
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000

    @classmethod
    def of(cls, config: dict[str, Any]) -> ZeroSettings:
        """Of a DeepSpeed configuration, such as ``ntpseg/configs/zero3.json``."""
        given = config.get("zero_optimization", {})
        names = cls.__dataclass_fields__
        return cls(**{name: int(value) for name, value in given.items() if name in names and value != "auto"})

    def resolved(self, hidden_size: int) -> tuple[int, int, int]:
        """Reduce bucket, prefetch bucket and persistence threshold."""
        given = (self.reduce_bucket_size, self.stage3_prefetch_bucket_size, self.stage3_param_persistence_threshold)
        auto = (hidden_size**2, int(0.9 * hidden_size**2), 10 * hidden_size)
        reduce, prefetch, persistence = (a if g is None else g for g, a in zip(given, auto, strict=True))
        return reduce, prefetch, persistence


@dataclass(frozen=True)
class TrafficOptions:
    """How a step is divided.

    Attributes:
        strategy: one of `STRATEGIES`.
        ranks: n.
        accumulation: micro-batches of a step.
        dtype: that is computed in: ``float32``, ``bfloat16`` or ``float16``. DeepSpeed and FSDP2 send weights and
            gradients in it, DDP sends the float32 gradients of autocast.
        activation_checkpointing: layers run forward a second time, in backward.
        zero: DeepSpeed's settings; for ZeRO-1, 2 and 3.

    Raises:
        ValueError: an unknown strategy or dtype, or a number below 1.
    """

    strategy: Strategy = "ddp"
    ranks: int = 1
    accumulation: int = 1
    dtype: str = "bfloat16"
    activation_checkpointing: bool = False
    zero: ZeroSettings = field(default_factory=ZeroSettings)

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("dtype", self.dtype, _BYTES)
        check_integer("ranks", self.ranks, 1)
        check_integer("accumulation", self.accumulation, 1)


def step_traffic(shape: ModelShape, options: TrafficOptions) -> list[Collective]:
    """What weights and gradients cost in one optimizer step; `training_collectives` says what else is sent.

    Args:
        shape: the model's parameters.
        options: ranks, dtype and the like.
    """
    if options.ranks == 1:
        return []
    size, ranks, accumulation = _BYTES[options.dtype], options.ranks, options.accumulation
    if options.strategy == "ddp":
        return data_parallel.ddp(shape, _BYTES["float32"])
    if options.strategy == "fsdp2":
        return data_parallel.fsdp2(shape, ranks, accumulation, size)
    reduce, prefetch, persistence = options.zero.resolved(shape.hidden_size)
    if options.strategy != "zero3":
        stage = int(options.strategy[-1])
        return zero.zero12(shape, stage, ranks, accumulation, size, reduce)
    buckets = zero3.Buckets(
        reduce=reduce,
        prefetch=prefetch,
        persistence=persistence,
        max_live=options.zero.stage3_max_live_parameters,
        max_reuse=options.zero.stage3_max_reuse_distance,
    )
    return zero3.zero3(shape, ranks, accumulation, size, buckets, checkpointing=options.activation_checkpointing)


@lru_cache(maxsize=256)  # plans and curves ask for the same steps on many GPUs and with many batches
def trainer_traffic(shape: ModelShape, options: TrafficOptions) -> tuple[Collective, ...]:
    """All that `NTPSegTrainer` sends in a step whose figures are logged, hard tokens left out; see `step_traffic`."""
    if options.ranks == 1:
        return ()
    ours = [*training_collectives(shape.heads, shape.terms), *logged_gathers(options.ranks)]
    return (*step_traffic(shape, options), *ours)
