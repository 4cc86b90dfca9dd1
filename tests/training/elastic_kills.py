"""Kills ranks at random moments while torchrun restarts them: ``python tests/training/elastic_kills.py --kills 20``.

Two ranks train under torchrun's own agent (its processes are forked, which saves their imports). In each life one rank
is ended by SIGKILL: after a random time, at a random event of training, or at a random flush or rename of a file, in
every third life one of a checkpoint's. The agent stops the other rank and starts both anew, with the settings of the
first start, and the run goes on by itself. What it ends with must be what an unbroken one ends with, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import kills as single
import torch
from kills import COMMON, EVENTS, KillAt, _counted, difference, outcome
from test_pipeline import write_data
from torch.distributed.elastic.multiprocessing import api as multiprocessing_api
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ntpseg.training import load_config, pipeline
from ntpseg.training.trainer import NTPSegTrainer

RUN = [
    *COMMON,
    "training.per_device_train_batch_size=1",
    "training.num_train_epochs=4",
    "training.eval_strategy=epoch",
    "training.save_strategy=steps",
    "training.save_steps=1",
    "optimizer.ema=0.9",
]


def draw(rng: random.Random, life: int, seconds: float) -> dict[str, Any]:
    """Rank and moment of a life's death; every third is in the middle of a checkpoint."""
    death: dict[str, Any] = {"rank": rng.randrange(2), "kind": "save" if life % 3 == 0 else "time"}
    if death["kind"] == "save":
        return {**death, "count": rng.randrange(24)}
    death["kind"] = rng.choice(("time", "event", "file"))
    if death["kind"] == "time":
        return {**death, "seconds": rng.uniform(0.0, 0.8 * seconds)}
    if death["kind"] == "event":
        return {**death, "event": rng.choice(EVENTS), "count": rng.randrange(4)}
    return {**death, "count": rng.randrange(80)}


def life(settings: list[str], deaths: list[dict[str, Any]], folder: str) -> None:
    """What a rank of one life does; `deaths` has that of each life that is to end early."""
    torch.set_num_threads(1)
    number, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    handle = os.open(Path(folder, f"life-{number}-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if number < len(deaths) and deaths[number]["rank"] == rank:
        arrange(deaths[number], Path(folder, f"killed-{number}"))
    pipeline.train(load_config("tiny", settings), progress=False)


def arrange(death: dict[str, Any], mark: Path) -> None:
    """See to it that this process dies as it is to, and leaves a mark that it did."""

    def die() -> None:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    single.die = die
    files = ("fsync", "replace", "rename", "unlink")
    if death["kind"] == "time":
        timer = threading.Timer(death["seconds"], die)
        timer.daemon = True
        timer.start()
    elif death["kind"] == "event":
        make_trainer = pipeline.make_trainer

        def make(*args: Any, **kwargs: Any) -> Any:
            trainer = make_trainer(*args, **kwargs)
            trainer.add_callback(KillAt(death["event"], death["count"]))
            return trainer

        pipeline.make_trainer = make
    elif death["kind"] == "file":
        left = [death["count"]]
        for name in files:
            setattr(os, name, _counted(getattr(os, name), left))
    else:
        write = NTPSegTrainer._write_checkpoint
        left = [death["count"]]

        def written(*args: Any) -> None:
            before = {name: getattr(os, name) for name in files}
            for name in files:
                setattr(os, name, _counted(before[name], left))
            try:
                write(*args)
            finally:
                for name, function in before.items():
                    setattr(os, name, function)

        NTPSegTrainer._write_checkpoint = written  # type: ignore[method-assign]


def launch(settings: list[str], deaths: list[dict[str, Any]], folder: Path) -> None:
    """Train with two ranks under torchrun's agent, which starts them anew after each death."""
    folder.mkdir()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=len(deaths),
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, life)(settings, deaths, str(folder))


def unbroken(data: Path, folder: Path) -> tuple[dict[str, Any], float]:
    """What a run leaves whose ranks live, and the seconds that it takes."""
    folder.mkdir()
    began = time.monotonic()
    launch([*RUN, f"data.path={data}", f"output={folder / 'run'}"], [], folder / "logs")
    return outcome(folder / "run"), time.monotonic() - began


def survive(
    kills: int, seed: int, data: Path, folder: Path, expected: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """A run with up to so many deaths; an unbroken one has left `expected` after `seconds`.

    Raises:
        SystemExit: the two differ.
    """
    folder.mkdir()
    rng = random.Random(seed)
    deaths = [draw(rng, number, seconds) for number in range(kills)]
    began = time.monotonic()
    try:
        launch([*RUN, f"data.path={data}", f"output={folder / 'run'}"], deaths, folder / "logs")
    except BaseException:
        for log in sorted((folder / "logs").glob("life-*.log"), key=lambda path: path.stat().st_mtime)[-2:]:
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
        raise
    # A life that was over before its death was due ends the run.
    lives = 1 + max(int(log.name.split("-")[1]) for log in (folder / "logs").glob("life-*.log"))
    if len(list((folder / "logs").glob("killed-*"))) != lives - 1:
        raise SystemExit("a life ended otherwise than by its death")
    wrong = difference(expected, outcome(folder / "run"))
    if wrong:
        raise SystemExit(f"the run differs from an unbroken one in {wrong} after {deaths[: lives - 1]}")
    found = Counter(death["kind"] for death in deaths[: lives - 1])
    return {
        "kills": lives - 1,
        "by": dict(found),
        "of_rank": dict(Counter(death["rank"] for death in deaths[: lives - 1])),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="file of the result")
    arguments = parser.parse_args()
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    close = multiprocessing_api.PContext.close
    # Of 30 seconds: a rank that waits for a dead one does not act on the agent's SIGTERM.
    multiprocessing_api.PContext.close = lambda self, signal=None, timeout=30: close(self, signal, 5)  # type: ignore
    command = f"python tests/training/elastic_kills.py --kills {arguments.kills} --seed {arguments.seed}"
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    total: dict[str, Any] = {"kills": 0, "runs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder / "data")
        expected, seconds = unbroken(data, folder / "unbroken")
        compared = "log, weights, optimizer, schedule, average, hard tokens: bit for bit"
        what = {"steps": expected["step"], "seconds_unbroken": round(seconds, 1), "compared": compared}
        while total["kills"] < arguments.kills:
            left, number = arguments.kills - total["kills"], len(total["runs"])
            result = survive(left, arguments.seed + number, data, folder / str(number), expected, seconds)
            total["runs"].append(result)
            total["kills"] += result["kills"]
            if arguments.write:
                rows = {"command": command, "machine": machine, **what, **total}
                arguments.write.write_text(json.dumps(rows, indent=2) + "\n")
    print(json.dumps(total))


if __name__ == "__main__":
    main()
