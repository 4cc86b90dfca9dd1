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
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from kills import COMMON, EVENTS, KillAt, _counted, die, difference, outcome
from test_pipeline import write_data
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
        arrange(deaths[number])
    pipeline.train(load_config("tiny", settings), progress=False)


def arrange(death: dict[str, Any]) -> None:
    """See to it that this process dies as it is to."""
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


def survive(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """An unbroken run, and one with so many deaths.

    Raises:
        SystemExit: the two differ.
    """
    rng = random.Random(seed)
    settings = [*RUN, f"data.path={write_data(folder / 'data')}"]
    began = time.monotonic()
    launch([*settings, f"output={folder / 'whole'}"], [], folder / "whole-logs")
    seconds = time.monotonic() - began
    expected = outcome(folder / "whole")
    deaths = [draw(rng, number, seconds) for number in range(kills)]
    began = time.monotonic()
    try:
        launch([*settings, f"output={folder / 'killed'}"], deaths, folder / "killed-logs")
    except BaseException:
        for log in sorted((folder / "killed-logs").glob("life-*.log"), key=lambda path: path.stat().st_mtime)[-2:]:
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
        raise
    # A life that was over before its death was due ends the run.
    lives = 1 + max(int(log.name.split("-")[1]) for log in (folder / "killed-logs").glob("life-*.log"))
    wrong = difference(expected, outcome(folder / "killed"))
    if wrong:
        raise SystemExit(f"the run differs from an unbroken one in {wrong} after {deaths[: lives - 1]}")
    found = Counter(death["kind"] for death in deaths[: lives - 1])
    return {
        "kills": lives - 1,
        "by": dict(found),
        "of_rank": dict(Counter(death["rank"] for death in deaths[: lives - 1])),
        "steps": expected["step"],
        "compared": "log, weights, optimizer, schedule, average, hard tokens: bit for bit",
        "seconds": round(time.monotonic() - began, 1),
        "seconds_unbroken": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="file of the result")
    arguments = parser.parse_args()
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    total: dict[str, Any] = {"kills": 0, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        while total["kills"] < arguments.kills:
            number = len(total["runs"])
            place = Path(folder, str(number))
            place.mkdir()
            result = survive(arguments.kills - total["kills"], arguments.seed + number, place)
            total["runs"].append(result)
            total["kills"] += result["kills"]
    print(json.dumps(total))
    if arguments.write:
        command = f"python tests/training/elastic_kills.py --kills {arguments.kills} --seed {arguments.seed}"
        machine = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
        arguments.write.write_text(json.dumps({"command": command, "machine": machine, **total}, indent=2) + "\n")


if __name__ == "__main__":
    main()
