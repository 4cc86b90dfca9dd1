"""``ntpseg plan``: memory, time and cost of a run, and what to change where it does not fit."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ntpseg.cluster.machines import Gpu
from ntpseg.cluster.planning.activations import layer_activations
from ntpseg.cluster.planning.search import Candidate, PlanOptions, choose, fits, remedies, usable_memory
from ntpseg.cluster.sentences import read_sentences
from ntpseg.cluster.workload import Workload
from ntpseg.evaluation.run_directory import training_log
from ntpseg.training.arguments import DEFAULTS
from ntpseg.training.config import RunConfig

_HOUR = 3600.0


@dataclass(frozen=True)
class Plan:
    """A plan; every figure is predicted but those that `measured` names.

    Attributes:
        preset: of the model.
        parameters: weights of the model.
        gpu: kind of GPU.
        options: what was asked for.
        chosen: the quickest way that fits, or the smallest where none does.
        fits: whether it does.
        usable: bytes of a GPU that tensors and framework may take.
        remedies: what would make it fit, where it does not.
        tokens: of the longest sequence; memory is for these.
        activations_by_length: bytes of one layer and micro-batch, by tokens of a sequence.
        mean_tokens: of a mean sequence; time is for these.
        sequences: of a step, all GPUs together.
        tokens_per_second: of all GPUs.
        utilisation: model FLOPs over the data sheet's rate.
        steps_per_epoch, hours_per_epoch, hours: of all epochs; None where the data set is not known.
        cost_per_epoch, cost: in the price's unit; None without price or data set.
        measured: names of figures that were measured, and where.
        arguments: settings of ``ntpseg train`` that carry it out.
    """

    preset: str
    parameters: int
    gpu: Gpu
    options: PlanOptions
    chosen: Candidate
    fits: bool
    usable: float
    remedies: tuple[str, ...]
    tokens: int
    activations_by_length: dict[int, int]
    mean_tokens: float
    sequences: int
    tokens_per_second: float
    utilisation: float
    steps_per_epoch: int | None
    hours_per_epoch: float | None
    hours: float | None
    cost_per_epoch: float | None
    cost: float | None
    measured: dict[str, str]
    arguments: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; sizes in bytes, times in seconds but where a name says hours."""
        fields = asdict(self)
        memory = self.chosen.memory
        fields["chosen"]["memory"] |= {"phase": memory.phase, "tensors": memory.tensors, "total": memory.total}
        return fields


def make_plan(
    config: RunConfig,
    gpu: Gpu,
    options: PlanOptions,
    *,
    data: str | Path | None = None,
    measured: str | Path | None = None,
) -> Plan:
    """Plan a run.

    Args:
        config: the run's; batch, accumulation and checkpointing of its ``training`` are where the search begins.
        gpu: on which kind.
        options: how many, and what is fixed.
        data: the data set; for epochs, and for lengths of its sentences.
        measured: a run on such GPUs, whose `mfu` replaces the predicted one.

    Raises:
        ValueError: a configuration whose memory is not modelled, a data set or a run that cannot be read.
    """
    if config.model.front_end != "codes":
        raise ValueError(f"model.front_end must be codes for a plan, got {config.model.front_end!r}")
    if config.optimizer.name != "adamw":
        raise ValueError(f"optimizer.name must be adamw for a plan, got {config.optimizer.name!r}")
    sources = {}
    if measured is not None:
        options = replace(options, mfu=measured_mfu(measured))
        sources["mfu"] = str(measured)
    work = Workload.of(config, None if data is None else read_sentences(config, data))
    chosen = choose(work, gpu, options)
    enough = fits(chosen, gpu)
    sequences = chosen.batch.samples * chosen.batch.accumulation * options.gpus
    pairs = work.sentences.pairs
    steps = None if pairs is None else -(-pairs // sequences)
    per_epoch = None if steps is None else steps * chosen.seconds / _HOUR
    epochs = float({**DEFAULTS, **config.training}["num_train_epochs"])
    hours = None if per_epoch is None else per_epoch * epochs
    price = None if options.price is None else options.price * options.gpus
    peak = gpu.bf16_flops if options.precision == "bfloat16" else gpu.fp32_flops
    return Plan(
        preset=work.preset,
        parameters=work.parameters.total,
        gpu=gpu,
        options=options,
        chosen=chosen,
        fits=enough,
        usable=usable_memory(gpu),
        remedies=() if enough else tuple(remedies(work, gpu, options)),
        tokens=work.longest,
        activations_by_length=_by_length(work, chosen),
        mean_tokens=work.mean_tokens,
        sequences=sequences,
        tokens_per_second=sequences * work.mean_tokens / chosen.seconds,
        utilisation=work.step_flops(sequences) / (chosen.seconds * peak * options.gpus),
        steps_per_epoch=steps,
        hours_per_epoch=per_epoch,
        hours=hours,
        cost_per_epoch=None if price is None or per_epoch is None else price * per_epoch,
        cost=None if price is None or hours is None else price * hours,
        measured=sources,
        arguments=_arguments(chosen),
    )


def measured_mfu(run: str | Path) -> float:
    """The median of `mfu` in a run's log, the first line left out: compilation and caches fall into it.

    Raises:
        ValueError: the directory is no run, or its log has no such figure.
    """
    folder = Path(run).expanduser()
    values = [row["mfu"] for row in training_log(folder) if isinstance(row.get("mfu"), float)]
    if not values:
        raise ValueError(f"measured must be a run whose log has mfu, got {folder}")
    return statistics.median(values[1:] or values)


def _by_length(work: Workload, chosen: Candidate) -> dict[int, int]:
    """At a quarter, a half and the whole of the longest sequence, whatever the checkpointing."""
    lengths = [work.longest // part for part in (4, 2, 1)]
    layers = [layer_activations(work, chosen.numerics, chosen.batch.samples, tokens) for tokens in lengths]
    return {tokens: layer.kept + layer.input for tokens, layer in zip(lengths, layers, strict=True)}


def _arguments(chosen: Candidate) -> tuple[str, ...]:
    batch, sharding = chosen.batch, chosen.numerics.sharding
    settings = [
        f"training.per_device_train_batch_size={batch.samples}",
        f"training.gradient_accumulation_steps={batch.accumulation}",
        f"training.activation_checkpointing={str(batch.checkpointing).lower()}",
        f"training.bf16={str(chosen.numerics.precision == 'bfloat16').lower()}",
    ]
    if sharding == "fsdp2":
        settings.append("training.fsdp=true")
    stage = sharding if chosen.numerics.offload == "none" else f"{sharding}_offload"
    return (*settings, *(("--deepspeed", stage) if chosen.numerics.zero else ()))
