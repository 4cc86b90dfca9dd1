"""``ntpseg plan``'s memory against that of real training steps on this machine.

``python -m benchmarks.plan_memory --out FILE [--only CASE ...]``; what the file holds of other cases stays, each with
the commit that it was measured at. Each case trains two steps in processes of its own: `NTPSegTrainer` with the
arguments of ``ntpseg train``, alone, or on two gloo ranks under DDP, DeepSpeed or FSDP2.

What is measured is the peak of the bytes that PyTorch's CPU allocator has given out, from ``torch.profiler``'s record
of every allocation: what ``torch.cuda.max_memory_allocated`` is on a GPU. The resident set would add what malloc keeps
of freed blocks and what libraries map, and a dispatch mode would miss temporaries inside operators. A block that
another thread freed (gloo's own) is not recorded as freed; it counts until its addresses are given out again.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from benchmarks.harness.environment import ROOT, commit, describe
from ntpseg.cluster.planning.memory import PHASES, Batch, MemoryPlan, memory_plan
from ntpseg.cluster.planning.numerics import Numerics
from ntpseg.cluster.sentences import TEXT_TOKENS
from ntpseg.cluster.workload import Workload, model_config, sequence_format
from ntpseg.training import load_config
from ntpseg.training.config import RunConfig
from ntpseg.utils.files import write_json

STEPS, GOAL = 2, 0.1
_MARK = "plan:"


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        preset: a ready configuration.
        sharding: see `ntpseg.cluster.planning.numerics.SHARDINGS`.
        samples: sequences of a micro-batch.
        accumulation: micro-batches of a step.
        checkpointing: of activations.
        precision: float32 or bfloat16.
        size: data.size; None: the configuration's.
        layers: of the decoder; None: the preset's.
    """

    preset: str
    sharding: str
    samples: int
    accumulation: int = 1
    checkpointing: bool = False
    precision: str = "float32"
    size: int | None = None
    layers: int | None = None

    @property
    def name(self) -> str:
        """For the table and `--only`."""
        parts = [self.preset, self.sharding, f"b{self.samples}"]
        parts += [f"l{self.layers}"] * (self.layers is not None)
        parts += [f"a{self.accumulation}"] * (self.accumulation > 1)
        parts += ["checkpointing"] * self.checkpointing + ["bf16"] * (self.precision == "bfloat16")
        return "-".join(parts)

    @property
    def ranks(self) -> int:
        """Two, but for one process."""
        return 1 if self.sharding == "one" else 2

    def config(self) -> RunConfig:
        """The run's."""
        settings = [
            f"training.per_device_train_batch_size={self.samples}",
            f"training.gradient_accumulation_steps={self.accumulation}",
            f"training.activation_checkpointing={str(self.checkpointing).lower()}",
            f"training.bf16={str(self.precision == 'bfloat16').lower()}",
            f"training.max_steps={STEPS}",
            "training.save_strategy=no",
            "training.eval_strategy=no",
        ]
        settings += [] if self.size is None else [f"data.size={self.size}"]
        settings += [] if self.layers is None else [f"model.overrides={{num_hidden_layers: {self.layers}}}"]
        config = load_config(self.preset, settings)
        config.deepspeed = self.sharding if self.sharding.startswith("zero") else None
        config.training |= {"fsdp": True} if self.sharding == "fsdp2" else {}
        return config


CASES = (
    *(Case("tiny", s, 4) for s in ("one", "ddp", "zero1", "zero2", "zero3", "fsdp2")),
    *(Case("small", s, 1) for s in ("one", "zero2", "zero3", "fsdp2")),
    *(Case("base", s, 1) for s in ("one", "zero2")),
    # Two ranks of the whole took ten minutes a case here.
    *(Case("base", s, 1, layers=4) for s in ("zero3", "fsdp2")),
    *(Case("tiny", s, 2, accumulation=2) for s in ("one", "zero2", "zero3")),
    *(Case("small", s, 1, checkpointing=True) for s in ("one", "zero2", "zero3", "fsdp2")),
    *(Case("tiny", s, 2, precision="bfloat16") for s in ("one", "zero2", "zero3")),
)


def predict(case: Case) -> tuple[Workload, MemoryPlan]:
    """The plan of a case."""
    work = Workload.of(case.config())
    batch = Batch(case.samples, case.accumulation, case.checkpointing)
    numerics = Numerics(case.sharding, case.precision, "cpu")
    return work, memory_plan(work, numerics, case.ranks, batch, pairs=_pairs(case))


def measure(case: Case) -> dict[str, float]:
    """Peak bytes by phase, of the rank that has most.

    Raises:
        RuntimeError: a process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if case.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.ranks)]
        command += ["-m", "benchmarks.plan_memory", "--worker", json.dumps(asdict(case)), "--out", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case.name} must train, got exit code {done.returncode}: {done.stderr[-4000:]}")
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return {phase: max(rank[phase] for rank in ranks) for phase in ranks[0]}


def compare(case: Case) -> dict[str, Any]:
    """Prediction and measurement of a case."""
    work, plan = predict(case)
    measured = measure(case)
    peak = max(measured[phase] for phase in ("forward", "backward", "step"))
    return {
        "case": case.name,
        **asdict(case),
        "ranks": case.ranks,
        "parameters": work.parameters.total,
        "tokens": work.longest,
        "predicted_bytes": plan.tensors,
        "measured_bytes": peak,
        "error": round(plan.tensors / peak - 1, 4),
        "predicted_phases": plan.peaks,
        "measured_phases": measured,
        "commit": commit(),
    }


# ---- one rank


class Pairs:
    """Random codes and sentences; the part of a token cache that training reads."""

    def __init__(self, config: RunConfig, count: int) -> None:
        sequence, rng = sequence_format(config), np.random.default_rng(0)
        vocabulary = sequence.vocabulary
        assert sequence.image_grid is not None
        self.image_codes = rng.integers(0, vocabulary.image_codes, (count, 1, *sequence.image_grid))
        self.mask_codes = rng.integers(0, vocabulary.mask_codes, (count, 1, *sequence.mask_grid))
        self.text = rng.integers(0, vocabulary.text_size, (count, TEXT_TOKENS))

    def text_ids(self, index: int, variant: int = 0) -> list[int]:
        """Ids of a sentence."""
        return self.text[index].tolist()

    def prefetch(self, indices: Sequence[int]) -> None:
        """Nothing: all is here."""


def mark(name: str) -> None:
    """The phase that begins here."""
    with record_function(_MARK + name):
        pass


def train(case: Case) -> dict[str, int]:
    """Two steps on this rank; peak bytes by phase of the second."""
    from ntpseg.memory import HardTokenMemory
    from ntpseg.models import NTPSegModel
    from ntpseg.models.sharded_init import build_sharded
    from ntpseg.training import Collator, NTPSegTrainer, TokenDataset
    from ntpseg.training.arguments import training_arguments
    from ntpseg.training.sharded_weights import shards_of_run

    torch.set_num_threads(1)
    config, count = case.config(), _pairs(case)
    sequence = sequence_format(config)
    settings, loss = config.model, config.loss
    folder = tempfile.TemporaryDirectory()
    args = training_arguments(config, Path(folder.name))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = model_config(config)
        made._attn_implementation = settings.attention or "causal_blocks"
        shards = shards_of_run(args) if case.sharding == "fsdp2" else None
        model = NTPSegModel(made) if shards is None else build_sharded(lambda: NTPSegModel(made), shards)
        model.register_forward_pre_hook(lambda *a: mark("forward"))
        model.register_forward_hook(lambda *a: mark("backward"))
        trainer = NTPSegTrainer(
            model,
            args,
            train_dataset=TokenDataset(Pairs(config, count), sequence),
            data_collator=Collator(sequence, grid_ids=settings.grid_positions),
            memory=HardTokenMemory(count, loss.hard_tokens),
            callbacks=[marks(case)],
        )
        trainer.train()
    folder.cleanup()
    return phase_peaks(profiler)


def marks(case: Case) -> TrainerCallback:
    """Marks the beginning and the end of the optimizer's step."""
    in_engine = case.sharding.startswith("zero")

    class Marks(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if not in_engine:
                mark("step")

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            mark("end")

    if in_engine:
        from deepspeed.runtime.engine import DeepSpeedEngine

        whole = DeepSpeedEngine.step

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            mark("step")
            return whole(self, *args, **kwargs)

        DeepSpeedEngine.step = step
    return Marks()


def phase_peaks(profiler: profile) -> dict[str, int]:
    """Peak of allocated bytes in each phase of the last step, and in all before it."""
    events = sorted(_events(profiler), key=lambda event: event[0])
    last = max(i for i, (_, name, _) in enumerate(events) if name == _MARK + "end")
    ends = [i for i, (_, name, _) in enumerate(events[:last]) if name == _MARK + "end"]
    blocks, phase, peaks = Blocks(), "start", {"start": 0}
    for index, (_, name, block) in enumerate(events[: last + 1]):
        if block is None:
            phase = name.removeprefix(_MARK) if index > ends[-1] else "start"
            continue
        blocks.change(*block)
        peaks[phase] = max(peaks.get(phase, 0), blocks.bytes)
    # Micro-batches after the first come back to the forward phase.
    return {name: peaks[name] for name in ("start", "forward", "backward", "step")}


class Blocks:
    """What an allocator has given out.

    Attributes:
        bytes: in all.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._size: dict[int, int] = {}
        self._order: list[int] = []

    def change(self, address: int, size: int) -> None:
        """A block of `size` bytes was given out at an address, or of ``-size`` was freed there."""
        if size <= 0:
            self._drop(address)
            return
        # What lies where a new block begins or ends was freed by a thread that is not recorded.
        low = bisect.bisect_right(self._order, address) - 1
        while low >= 0 and self._order[low] + self._size[self._order[low]] > address:
            self._drop(self._order[low])
            low -= 1
        while (high := bisect.bisect_left(self._order, address)) < len(self._order):
            if self._order[high] >= address + size:
                break
            self._drop(self._order[high])
        bisect.insort(self._order, address)
        self._size[address] = size
        self.bytes += size

    def _drop(self, address: int) -> None:
        if address in self._size:
            self.bytes -= self._size.pop(address)
            del self._order[bisect.bisect_left(self._order, address)]


def _events(profiler: profile) -> Iterator[tuple[int, str, tuple[int, int] | None]]:
    """Time, name and, of allocations, address and signed size."""
    kind = torch._C._profiler._EventType.Allocation
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    waiting = list(results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0] == kind:
            fields = event.typed[1]
            yield event.start_time_ns, "", (fields.ptr, fields.alloc_size)
        elif event.name.startswith(_MARK):
            yield event.start_time_ns, event.name, None


def _pairs(case: Case) -> int:
    return STEPS * case.samples * case.accumulation * case.ranks


def _worker(case: Case, folder: Path) -> None:
    from ntpseg.training.distributed import end_processes, rank

    peaks = train(case)
    (folder / f"{rank()}.json").write_text(json.dumps(peaks))
    end_processes()


def main() -> int:
    """Measure all and write the file; 1 where a case misses the goal."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--only", nargs="+", help="names of cases")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        _worker(Case(**json.loads(args.worker)), args.out)
        return 0
    unknown = sorted(set(args.only or ()) - {case.name for case in CASES})
    if unknown:
        options.error(f"--only must name cases of {', '.join(case.name for case in CASES)}, got {', '.join(unknown)}")
    rows = json.loads(args.out.read_text())["cases"] if args.out.is_file() else []
    for case in (case for case in CASES if not args.only or case.name in args.only):
        row = compare(case)
        rows = merged(rows, row)
        sizes = [row[name] / 2**20 for name in ("predicted_bytes", "measured_bytes")]
        print(f"{case.name:32} {sizes[0]:9.1f} {sizes[1]:9.1f} MiB {row['error']:+.1%}", flush=True)
        for phase, size in row["measured_phases"].items():
            planned = [f"{k} {v / 2**20:.1f}" for k, v in plan_phases(row, phase)]
            print(f"    {phase:10} {size / 2**20:9.1f}   {', '.join(planned)}", flush=True)
        write_json(args.out, result(rows))
    return int(bool(result(rows)["missed"]))


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with that of a case anew, in the order of `CASES`."""
    order = [case.name for case in CASES]
    found = {each["case"]: each for each in (*rows, row)}
    return sorted(found.values(), key=lambda each: order.index(each["case"]) if each["case"] in order else len(order))


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the file holds; its rows have commits of their own."""
    machine = describe(torch.device("cpu"))
    return {
        "benchmark": "plan_memory",
        "command": "python -m benchmarks.plan_memory --out FILE",
        "measure": "peak of the bytes given out by PyTorch's CPU allocator in the second step, fullest rank",
        "goal": GOAL,
        "missed": [row["case"] for row in rows if abs(row["error"]) > GOAL],
        "cases": rows,
        **{name: value for name, value in machine.items() if name != "commit"},
    }


def plan_phases(row: dict[str, Any], phase: str) -> list[tuple[str, int]]:
    """The predicted moments of a measured phase."""
    return [(name, row["predicted_phases"][name]) for name in PHASES if name.startswith(phase)]


if __name__ == "__main__":
    sys.exit(main())
