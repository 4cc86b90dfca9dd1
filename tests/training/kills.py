"""Kills training at random moments and resumes it, until so many kills are survived: ``make kills KILLS=200``.

``python tests/training/kills.py --kills 200 --seed 0 --fresh 0.1``

Every life of a run is a process of its own that is ended by SIGKILL: after a random time, at a random event of training
(in the middle of an accumulated step, of an evaluation, of a checkpoint) or at a random flush or rename of a file. What
a run ends with, whatever its deaths, must be what an unbroken one ends with, bit for bit: every line of its log that is
no measurement of time, the model, the optimizer, the average and the hard tokens.

Lives are forked from this program, which has nothing loaded but code; `--fresh` starts that share of them as programs
of their own, which takes seconds for each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from test_pipeline import FAST, write_data
from transformers import TrainerCallback

from ntpseg.evaluation.run_directory import training_log
from ntpseg.training import load_config, pipeline
from ntpseg.training.checkpoint import checkpoints

COMMON = [*FAST, "training.gradient_accumulation_steps=2", "training.per_device_train_batch_size=2"]
STEM = [
    "model.stem.widths=[8,16]",
    "model.stem.group_size=4",
    "model.stem.caption_dim=8",
    "model.stem.caption_hidden=8",
]
# Evaluations and checkpoints fall together in some runs and apart in others; "pixels" has Muon, an average of the
# weights, augmentation, and drafts and noise drawn in every step.
KINDS: dict[str, tuple[str, list[str]]] = {
    "epochs": (
        "tiny",
        [
            "training.num_train_epochs=4",
            "training.eval_strategy=epoch",
            "training.save_strategy=steps",
            "training.save_steps=3",
        ],
    ),
    "steps": (
        "tiny",
        [
            "training.num_train_epochs=4",
            "training.eval_strategy=steps",
            "training.eval_steps=2",
            "training.save_strategy=steps",
            "training.save_steps=1",
            "training.logging_steps=4",
            "optimizer.ema=0.9",
        ],
    ),
    "pixels": (
        "qata",
        [
            *STEM,
            "vision.image_codes=0",
            "data.variants=0",
            "data.augment.flip=0.5",
            "max_minutes=null",
            "training.num_train_epochs=3",
            "training.eval_strategy=epoch",
            "training.save_strategy=epoch",
        ],
    ),
}
EVENTS = (
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_prediction_step",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
)
# Of logs: what differs between two runs that are the same.
TIMES = ("runtime", "per_second", "step_seconds", "mfu", "_gib", "_share", "het_wait", "het_sent")


class KillAt(TrainerCallback):
    """Ends the process at the n-th of one event."""

    def __init__(self, event: str, count: int) -> None:
        self.left = count
        setattr(self, event, self._count)

    def _count(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def live(preset: str, settings: list[str], death: dict[str, Any] | None) -> None:
    """Train, or go on where there is a run; `death` says when to die, beside what the parent does."""
    torch.set_num_threads(1)
    config = load_config(preset, settings)
    if death is not None and death["kind"] == "event":
        make_trainer = pipeline.make_trainer

        def make(*args: Any, **kwargs: Any) -> Any:
            trainer = make_trainer(*args, **kwargs)
            trainer.add_callback(KillAt(death["event"], death["count"]))
            return trainer

        pipeline.make_trainer = make
    if death is not None and death["kind"] == "file":
        left = [death["count"]]
        for name in ("fsync", "replace", "rename", "unlink"):
            setattr(os, name, _counted(getattr(os, name), left))
    pipeline.train(config, resume=(Path(str(config.output)) / "config.yaml").is_file(), progress=False)


def _counted(function: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            die()
        return function(*args, **kwargs)

    return counted


def start(preset: str, settings: list[str], death: dict[str, Any] | None, log: Path, *, fresh: bool) -> int:
    """Start a life; its process id."""
    if fresh:
        call = json.dumps([preset, settings, death])
        with log.open("wb") as output:
            command = [sys.executable, __file__, "--life", call]
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT).pid
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        live(preset, settings, death)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid: int, death: dict[str, Any] | None) -> int:
    """Wait for a life, or end it in time; its exit code, negative of a signal."""
    timer = None
    if death is not None and death["kind"] == "time":
        timer = threading.Timer(death["seconds"], os.kill, (pid, signal.SIGKILL))
        timer.start()
    _, status = os.waitpid(pid, 0)
    if timer is not None:
        timer.cancel()
        timer.join()
    return os.waitstatus_to_exitcode(status)


def draw_death(rng: random.Random, seconds: float, fresh: bool) -> dict[str, Any]:
    """A moment to die at; `seconds` is what an unbroken run takes."""
    kind = rng.choice(("time", "event", "event", "file"))
    if kind == "time":
        return {"kind": kind, "seconds": rng.uniform(0.0, 0.6 * seconds) + (5.0 if fresh else 0.0)}
    if kind == "event":
        return {"kind": kind, "event": rng.choice(EVENTS), "count": rng.randrange(4)}
    return {"kind": kind, "count": rng.randrange(120)}


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run leaves, apart from times."""
    rows = [row for row in training_log(run) if "train_runtime" not in row]
    log = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows]
    evaluations = {row["step"]: row for row in log if "eval_loss" in row}
    step, last = checkpoints(run)[-1]
    state: dict[str, Any] = {"log": [row for row in log if "eval_loss" not in row], "evaluations": evaluations}
    state |= {"step": step, "model": load_file(run / "model" / "model.safetensors")}
    for name in ("hard_tokens_0.pt", "optimizer.pt", "scheduler.pt"):
        if (last / name).is_file():
            state[name] = torch.load(last / name, weights_only=True)
    if (last / "ema.safetensors").is_file():
        state["average"] = load_file(last / "ema.safetensors")
    return state


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two outcomes differ first; None where they are the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{where}/{k}"))), None)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries"
        return next((d for n, (x, y) in enumerate(zip(a, b)) if (d := difference(x, y, f"{where}/{n}"))), None)
    if torch.is_tensor(a) and torch.is_tensor(b):
        return None if a.dtype == b.dtype and torch.equal(a, b) else f"{where}: tensors"
    return None if a == b else f"{where}: {a!r} and {b!r}"


def survive(kills: int, seed: int, folder: Path, fresh: float = 0.0) -> dict[str, Any]:
    """Run after run until `kills` kills.

    Raises:
        SystemExit: a life ended by itself with an error, or a run ended otherwise than an unbroken one.
    """
    rng, log = random.Random(seed), folder / "life.log"
    data = write_data(folder / "data")
    began, runs, deaths = time.monotonic(), 0, Counter[str]()
    references: dict[str, tuple[dict[str, Any], float]] = {}

    def fail(message: str, history: list[Any]) -> None:
        raise SystemExit(f"{message}\nafter {history}\n{log.read_text(errors='replace')[-4000:]}")

    while sum(deaths.values()) < kills:
        kind = list(KINDS)[runs % len(KINDS)]
        preset, own = KINDS[kind]
        settings = [*COMMON, *own]
        if kind not in references:
            whole = folder / f"{kind}-whole"
            started = time.monotonic()
            if end(start(preset, [*settings, f"data.path={data}", f"output={whole}"], None, log, fresh=False), None):
                fail(f"the unbroken run {kind} failed", [])
            references[kind] = outcome(whole), time.monotonic() - started
        expected, seconds = references[kind]
        run, history, code = folder / f"run-{runs}", [], -1
        while code:
            is_fresh = rng.random() < fresh
            death = draw_death(rng, seconds, is_fresh) if sum(deaths.values()) < kills else None
            history.append(death)
            code = end(
                start(preset, [*settings, f"data.path={data}", f"output={run}"], death, log, fresh=is_fresh), death
            )
            if code == -signal.SIGKILL:
                deaths[death["kind"] if death else "unasked"] += 1
            elif code:
                fail(f"a life of {kind} ended with {code}", history)
        found = outcome(run)
        wrong = difference(expected, found)
        if wrong:
            fail(f"{kind} differs from an unbroken run in {wrong}", history)
        shutil.rmtree(run)
        runs += 1
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "kills": sum(deaths.values()),
        "by": dict(deaths),
        "runs": runs,
        "seconds": time.monotonic() - began,
        "processor_seconds": children.ru_utime + children.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", type=float, default=0.0, help="share of lives that are programs of their own")
    parser.add_argument("--life", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.life:
        live(*json.loads(arguments.life))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(survive(arguments.kills, arguments.seed, Path(folder), arguments.fresh)))


if __name__ == "__main__":
    main()
