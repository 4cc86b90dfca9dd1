"""Real training steps on the ranks of torchrun, their collectives counted and predicted: one process of many.

``torchrun --nproc-per-node 2 -m benchmarks.communication_steps OUTPUT CASE ...``; `benchmarks.communication` starts it.
A CASE is ``preset,strategy`` with any of ``accumulation=``, ``dtype=bfloat16``, ``checkpointing=1``, ``max_live=``,
``max_reuse=``; or ``het`` or ``vocabulary``, what this package exchanges by itself.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.collectives import Calls, counted
from benchmarks.models import Size
from benchmarks.training_log import _Samples
from ntpseg import ntp_loss
from ntpseg.cluster.communication import (
    Collective,
    ModelShape,
    TrafficOptions,
    het_exchange,
    trainer_traffic,
    vocab_parallel_loss,
)
from ntpseg.cluster.communication.strategies import ZeroSettings
from ntpseg.losses.options import LossOptions
from ntpseg.losses.products import Tiling
from ntpseg.memory import HardTokenMemory
from ntpseg.models.sharded_init import build_sharded
from ntpseg.training import Collator, NTPSegTrainer
from ntpseg.training.argument_rules import installed_names
from ntpseg.training.arguments import DEFAULTS, FIXED
from ntpseg.training.distributed import deepspeed_config, end_processes, prepare_deepspeed
from ntpseg.training.sharded_weights import shards_of_run

# The first steps form DDP's buckets and DeepSpeed's trace of modules.
_COUNTED_STEP = 3
_HARD_TOKENS, _NEGATIVES = 16, 5


@dataclass(frozen=True)
class Case:
    """One training step to be counted; see the module for the names of its fields."""

    preset: str
    strategy: str
    accumulation: int = 1
    dtype: str = "float32"
    checkpointing: int = 0
    max_live: int | None = None
    max_reuse: int | None = None

    @classmethod
    def parse(cls, text: str) -> Case:
        """Of a command line's argument."""
        preset, strategy, *rest = text.split(",")
        fields = dict(item.split("=") for item in rest)
        return cls(preset, strategy, **{k: v if k == "dtype" else int(v) for k, v in fields.items()})  # type: ignore[arg-type]

    def size(self) -> Size:
        """Model and batch: short sequences, since what is sent does not depend on their length."""
        grid, codes, text = (4, 24, 64) if self.preset == "smallest" else (6, 512, 512)
        return Size(self.preset, grid, codes, text, batch=2, heads=3, dtype=self.dtype)


class _CountStep(TrainerCallback):
    """Counts from the beginning of one step to that of the next."""

    def __init__(self) -> None:
        self.calls: Calls = Counter()
        self._block: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _COUNTED_STEP:
            self._block = counted()
            self.calls = self._block.__enter__()
        elif self._block is not None:
            self._block.__exit__(None, None, None)
            self._block = None


def deepspeed_settings(case: Case) -> dict[str, Any] | None:
    """The shipped configuration, with the case's limits."""
    if not case.strategy.startswith("zero"):
        return None
    config = deepspeed_config(case.strategy)
    assert config is not None
    for name, value in {"max_live_parameters": case.max_live, "max_reuse_distance": case.max_reuse}.items():
        if value is not None:
            config["zero_optimization"][f"stage3_{name}"] = value
    return config


def by_trainer(case: Case) -> tuple[Calls, list[Collective]]:
    """A step of `NTPSegTrainer`, counted and predicted."""
    size, ranks, steps = case.size(), dist.get_world_size(), _COUNTED_STEP + 2
    cpu = torch.device("cpu")
    ids, labels = size.batch_of(cpu)
    config = deepspeed_settings(case)
    options = TrafficOptions(
        strategy=case.strategy,  # type: ignore[arg-type]
        ranks=ranks,
        accumulation=case.accumulation,
        dtype=case.dtype,
        activation_checkpointing=bool(case.checkpointing),
        zero=ZeroSettings.of(config or {}),
    )
    samples = _Samples(ids, labels, steps * case.accumulation * ranks)
    with tempfile.TemporaryDirectory() as folder:
        fields = {**DEFAULTS, **FIXED, "bf16": case.dtype == "bfloat16", "use_cpu": True, "deepspeed": config}
        fields |= {"per_device_train_batch_size": size.batch, "gradient_accumulation_steps": case.accumulation}
        fields |= {"logging_steps": 1, "num_train_epochs": 1, "save_strategy": "no", "disable_tqdm": True}
        fields |= {"output_dir": folder, "dataloader_pin_memory": False, "ddp_find_unused_parameters": False}
        fields |= installed_names({"activation_checkpointing": bool(case.checkpointing)})
        fields |= {"fsdp": True} if case.strategy == "fsdp2" else {}
        args = TrainingArguments(**fields)
        shards = shards_of_run(args) if case.strategy == "fsdp2" else None
        model: Any = size.model(cpu) if shards is None else build_sharded(lambda: size.model(cpu), shards)
        shape = ModelShape.of(model)  # before the ranks divide the weights
        step = _CountStep()
        trainer = NTPSegTrainer(
            model,
            args,
            train_dataset=samples,
            data_collator=Collator(size.sequence(), grid_ids=False),
            memory=HardTokenMemory(len(samples), _HARD_TOKENS),
            callbacks=[step],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    dist.barrier()
    return step.calls, list(trainer_traffic(shape, options))


def het() -> tuple[Calls, list[Collective]]:
    """The second epoch's exchange of hard-token memories; every row is full."""
    ranks, rank, samples, length = dist.get_world_size(), dist.get_rank(), 96, 24
    memory = HardTokenMemory(samples, _HARD_TOKENS)
    generator = torch.Generator().manual_seed(rank)
    own = torch.arange(samples).chunk(ranks)[rank]

    def epoch() -> None:
        labels = torch.randint(0, 50, (len(own), length), generator=generator)
        prediction = torch.randint(0, 50, (len(own), length), generator=generator)
        memory.record(own, prediction, labels, torch.rand(len(own), length, generator=generator))

    epoch()
    memory.sync()
    memory.advance()
    epoch()
    with counted() as calls:
        memory.sync()
    return calls, het_exchange((0, samples // ranks), _HARD_TOKENS, ranks)


def vocabulary() -> tuple[Calls, list[Collective]]:
    """The loss of heads that share one output matrix, its classes divided over the ranks."""
    ranks, rank, classes, features, heads = dist.get_world_size(), dist.get_rank(), 256, 32, 2
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 40, heads, features, generator=generator, requires_grad=True)
    weight = torch.randn(classes, features, generator=generator)
    labels = torch.randint(0, classes, (2, 40), generator=generator)
    own: Tensor = weight.chunk(ranks)[rank].clone().requires_grad_()
    budget = 16_384
    options = LossOptions(negatives=_NEGATIVES, chunk_bytes=budget)
    with counted() as calls:
        ntp_loss(hidden, own, labels, group=dist.group.WORLD, options=options).loss.backward()
    rows = 2 * sum(40 - 1 - head for head in range(heads))
    tiling = Tiling.choose(rows, classes // ranks, torch.float32, torch.device("cpu"), budget)
    blocks = -(-rows // tiling.block_rows)
    return calls, vocab_parallel_loss(rows, rows * features, blocks, _NEGATIVES, 0, ranks)


def compare(name: str) -> dict[str, Any]:
    """A case's counts beside its predictions, by kind, and the sizes on which they differ."""
    if name in ("het", "vocabulary"):
        calls, predicted = {"het": het, "vocabulary": vocabulary}[name]()
    else:
        case = Case.parse(name)
        calls, predicted = by_trainer(case)
    expected: Calls = Counter()
    for each in predicted:
        expected[each.kind, each.payload] += each.calls
    gc.collect()  # engines and their hooks refer to each other, and ranks share the machine's memory
    row: dict[str, Any] = {"case": name, "ranks": dist.get_world_size(), "kinds": {}}
    for kind in sorted({kind for kind, _ in calls | expected}):
        row["kinds"][kind] = {
            what: {
                "calls": sum(n for (k, _), n in found.items() if k == kind),
                "bytes": sum(size * n for (k, size), n in found.items() if k == kind),
            }
            for what, found in (("measured", calls), ("predicted", expected))
        }
    row["only_measured"] = sorted([*key, n] for key, n in (calls - expected).items())
    row["only_predicted"] = sorted([*key, n] for key, n in (expected - calls).items())
    return row


def main(output: Path, names: list[str]) -> None:
    """Rank 0 writes a row for each case."""
    torch.set_num_threads(1)
    prepare_deepspeed()
    rows = [compare(name) for name in names]
    if dist.get_rank() == 0:
        output.write_text(json.dumps(rows))
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
