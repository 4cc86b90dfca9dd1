"""What the logs of training say beside the train benchmark, and which parts a training step on a CPU has.

    python -m benchmarks.training_log [--preset tiny] [--steps 8] [--results FILE]

One process trains by `NTPSegTrainer` on the batches of `benchmarks.train` and, at the end of each of its steps (while
the trainer's clock stands still), runs the benchmark's own step and its linear layers alone. All times are the
process's processor time. Then a few more steps are profiled.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.harness.environment import describe
from benchmarks.harness.rows import RESULTS, rounded
from benchmarks.harness.timing import quartiles
from benchmarks.models import Size
from benchmarks.train import _ours, products
from ntpseg.memory import HardTokenMemory
from ntpseg.models.attention import default_attention
from ntpseg.training import Collator, NTPSegTrainer
from ntpseg.training.arguments import DEFAULTS, FIXED
from ntpseg.training.dataset import EpochDataset
from ntpseg.training.hardware import keep_freed_memory
from ntpseg.training.profiling import FOLDER, ProfileSteps
from ntpseg.training.throughput import count_batch
from ntpseg.utils.files import write_json

_PROFILED = 3
# Steps of an epoch. The first serves no hard error token and is the warm-up; the benchmark's step always has 16.
_EPOCH = 2


class _Samples(EpochDataset):
    """The benchmark's sequences, again and again."""

    def __init__(self, ids: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
        super().__init__(0)
        self.ids, self.labels, self.steps = ids.numpy(), labels.numpy(), steps

    def __len__(self) -> int:
        return self.steps * len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index % len(self.ids)
        return {"sample_ids": index, "input_ids": self.ids[row], "labels": self.labels[row]}


class _Beside(TrainerCallback):
    """Runs calls between the trainer's steps, by a clock that it does not see."""

    def __init__(self, calls: dict[str, Any]) -> None:
        self.calls, self.trainer = calls, None
        self.seconds: dict[str, list[float]] = {name: [] for name in ("log", *calls)}
        self.figures: list[dict[str, float]] = []

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        trainer: Any = self.trainer
        if not logs or "step_seconds" not in logs:
            return
        with trainer.throughput.pause():
            self.figures.append(dict(logs))
            self.seconds["log"].append(logs["step_seconds"])
            # The order turns, so that nobody always follows the same neighbour.
            turn = len(self.figures) % len(self.calls)
            order = list(self.calls.items())
            for name, call in order[turn:] + order[:turn]:
                start = time.process_time()
                call()
                self.seconds[name].append(time.process_time() - start)


def make_trainer(size: Size, folder: Path, steps: int, callbacks: list[Any]) -> NTPSegTrainer:
    """A trainer of the benchmark's model and batches with the settings that `ntpseg train` starts from."""
    cpu = torch.device("cpu")
    ids, labels = size.batch_of(cpu)
    model: Any = size.model(cpu)
    if attention := default_attention():
        model.set_attn_implementation(attention)
    fields = {**DEFAULTS, **FIXED, "bf16": False, "use_cpu": True, "dataloader_pin_memory": False}
    fields |= {
        "per_device_train_batch_size": size.batch,
        "logging_steps": 1,
        "num_train_epochs": -(-steps // _EPOCH),
        "learning_rate": 1e-5,
    }
    fields |= {"save_strategy": "no", "disable_tqdm": True, "output_dir": str(folder)}
    trainer = NTPSegTrainer(
        model,
        TrainingArguments(**fields),
        train_dataset=_Samples(ids, labels, _EPOCH),
        data_collator=Collator(size.sequence(), grid_ids=False),
        memory=HardTokenMemory(_EPOCH * size.batch, 16),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def compare(size: Size, steps: int, folder: Path) -> dict[str, Any]:
    """The log beside the benchmark's step: ratios within a step, and what counting costs."""
    cpu = torch.device("cpu")
    ids, labels = size.batch_of(cpu)
    model = size.model(cpu)
    rows = int((labels[:, 1:] != -100).sum())
    calls = {
        "bench": _ours(model, ids, labels, torch.float32),
        "bench, sdpa": _ours(model, ids, labels, torch.float32, "sdpa"),
        "products": products(model, ids.numel(), rows * size.heads, torch.float32),
    }
    beside = _Beside(calls)
    trainer = make_trainer(size, folder, _EPOCH + steps, [beside])
    beside.trainer = trainer  # type: ignore[assignment]
    trainer.throughput.now = time.process_time
    trainer.train()
    seconds = {name: values[_EPOCH:] for name, values in beside.seconds.items()}
    figures = beside.figures[-1]
    counted = {"input_ids": ids, "sample_ids": torch.arange(len(ids))}
    start = time.process_time()
    for _ in range(100):
        count_batch(counted, model.config.text_config.pad_token_id, cpu)
    counting = (time.process_time() - start) / 100
    pairs = [("log", "bench"), *((name, "products") for name in seconds if name != "products")]
    return {
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "ratios": {
            f"{one} / {two}": quartiles([a / b for a, b in zip(seconds[one], seconds[two], strict=True)])
            for one, two in pairs
        },
        "tokens": {"log": figures["tokens_per_second"] * figures["step_seconds"], "bench": ids.numel()},
        "counting_share": counting / quartiles(seconds["log"])["median"],
        "steps": len(seconds["log"]),
    }


def parts(size: Size, folder: Path) -> dict[str, Any]:
    """The table of a profile of the trainer's steps."""
    trainer = make_trainer(size, folder, 4 + _PROFILED, [ProfileSteps(folder, _PROFILED)])
    trainer.train()
    print((folder / FOLDER / "parts.txt").read_text(encoding="utf-8"))
    return json.loads((folder / FOLDER / "parts.json").read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--preset", default="tiny", help="smallest, or one of the presets")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--results", type=Path, default=RESULTS / "training_log_cpu.json")
    args = options.parse_args(arguments)
    keep_freed_memory()
    size = Size(args.preset, 14, 512, dtype="float32")
    if args.preset == "smallest":
        size = Size(args.preset, 4, 24, 64, batch=2, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        result = compare(size, args.steps, Path(folder))
        table = parts(size, Path(folder))
    result |= {"parts": table, "case": size.parameters(), **describe(torch.device("cpu"))}
    result["threads"] = torch.get_num_threads()
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio['median']:.3f} [{ratio['p25']:.3f}, {ratio['p75']:.3f}]")
    print(f"counting: {result['counting_share']:.3%} of a step")
    write_json(args.results, rounded(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
