"""A rank that stands still is named by number, host and place, and every rank ends with a code of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ntpseg.training.hang import DEFAULT_SECONDS, HUNG, HangWatch, _place, _rank_of, watch_seconds

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hung")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "hanging_ranks.py"), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output


def lines(folder: Path) -> list[str]:
    text = "".join((folder / f"rank-{rank}.log").read_text() for rank in (0, 1))
    return [line for line in text.splitlines() if line.startswith("ntpseg:")]


def test_a_rank_that_sleeps(hung: Path) -> None:
    folder = hung / "sleep"
    assert json.loads((folder / "codes.json").read_text()) == [HUNG, HUNG]
    (line,) = lines(folder)
    assert line.startswith(f"ntpseg: rank 1 on {socket.gethostname()} has stood still for ")
    assert "after step 3, past 'step begin', in stand_still (hanging_ranks.py:" in line
    assert f"all ranks end with exit code {HUNG}" in line
    stacks = (folder / "logs" / "hang-rank-1.txt").read_text()
    assert "in stand_still" in stacks and "in training_step" in stacks
    assert (folder / "logs" / "hang-rank-0.txt").stat().st_size


def test_a_rank_that_is_stopped(hung: Path) -> None:
    folder = hung / "stop"
    assert json.loads((folder / "codes.json").read_text()) == [HUNG, -9]
    (line,) = lines(folder)
    assert line.startswith(f"ntpseg: rank 1 on {socket.gethostname()} gives no sign")


def test_a_run_that_gets_on_is_left_alone(hung: Path) -> None:
    folder = hung / "none"
    assert json.loads((folder / "codes.json").read_text()) == [0, 0] and not lines(folder)
    assert not list((folder / "logs").iterdir()), "nothing is left"


def test_who_comes_first() -> None:
    waits = {"count": 7, "waiting": 2, "idle": 9.0}
    sleeps = {"count": 7, "waiting": 0, "idle": 8.0}
    behind = {"count": 6, "waiting": 2, "idle": 8.0}
    assert min((waits, sleeps), key=_rank_of) is sleeps
    assert min((waits, sleeps, behind), key=_rank_of) is behind, "what others wait for comes before that"


def test_the_place_names_who_called() -> None:
    def wait() -> None:
        event.wait(20)

    event = threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    try:
        where, waiting = _place(sys._current_frames()[thread.ident or 0])
    finally:
        event.set()
        thread.join()
    assert where.startswith("wait (threading.py:") and "called from wait (test_hang.py:" in where and waiting == 0


def test_the_limit() -> None:
    assert watch_seconds(None, 1) == 0 and watch_seconds(None, 2) == DEFAULT_SECONDS
    assert watch_seconds(0, 8) == 0 and watch_seconds(60.0, 1) == 60


def test_the_setting_is_checked_and_no_field_of_transformers(tmp_path: Path) -> None:
    from ntpseg.training import load_config
    from ntpseg.training.arguments import training_arguments

    config = load_config("tiny", ["training.hang_timeout=90"])
    assert not hasattr(training_arguments(config, tmp_path), "hang_timeout")
    for value in ("-1", "soon", "true"):
        with pytest.raises(ValueError, match=r"training\.hang_timeout must be a number >= 0"):
            load_config("tiny", [f"training.hang_timeout={value}"])


def test_a_process_that_was_suspended_gets_its_time_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    ended = threading.Event()
    watch = HangWatch(tmp_path, 20.0)
    monkeypatch.setattr(watch, "_end", ended.set)
    watch._interval = 0.05
    clock = [0.0]
    monkeypatch.setattr("ntpseg.training.hang.time.monotonic", lambda: clock[0])
    with watch:
        watch.on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
        time.sleep(0.3)
        clock[0] += 3600.0  # all of the process stood, its thread too
        time.sleep(0.3)
        assert not ended.is_set()
        for _ in range(25):  # now the thread runs, and training does not
            clock[0] += 1.0
            time.sleep(0.08)
        assert ended.wait(5)


def test_each_look_lists_the_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of ranks look every second at a file system that they share."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    watch = HangWatch(tmp_path, 1000.0, rank=2, ranks=500)
    monkeypatch.setattr("ntpseg.training.hang.dist.barrier", lambda: None)
    ended, looks, listed = threading.Event(), [], []
    monkeypatch.setattr(watch, "_end", ended.set)
    watch._interval = 0.02
    real, listing = Path.stat, os.listdir

    def stat(path: Path, *args: Any, **kwargs: Any) -> os.stat_result:
        if path.suffix == ".json":
            looks.append(path)
        return real(path, *args, **kwargs)

    def listdir(path: Path) -> list[str]:
        listed.append(path)
        return listing(path)

    with watch:
        watch.on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
        (watch.folder / "hang-rank-900.json").write_text("{}")  # of a larger launch before
        monkeypatch.setattr(Path, "stat", stat)
        monkeypatch.setattr("ntpseg.training.hang.os.listdir", listdir)
        time.sleep(0.3)
        monkeypatch.setattr(Path, "stat", real)
        assert listed and not looks and not ended.is_set()
        (watch.folder / "hang-rank-499.json").write_text("{}")
        assert ended.wait(5), "another rank has found that all stand"
