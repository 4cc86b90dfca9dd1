"""``--autoresume`` begins or goes on; what torchrun starts anew goes on with the run that its launch began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import FAST, write_data
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.training.checkpoint import checkpoints
from ntpseg.training.launch import is_restart, mark

HERE = Path(__file__).parent


def steps(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def test_autoresume_begins_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntpseg.training import pipeline

    run = tmp_path / "run"
    settings = ["train", "tiny", f"data.path={write_data(tmp_path / 'data')}", f"output={run}", *FAST]
    settings += ["training.save_strategy=steps", "training.save_steps=1"]
    for other in ("--resume", "--overwrite"):
        refused = CliRunner().invoke(app, [*settings, "--autoresume", other])
        assert str(refused.exception) == f"--autoresume must be given alone, got {other} with it"
    begun = CliRunner().invoke(app, [*settings, "training.num_train_epochs=1", "--autoresume"])
    assert begun.exit_code == 0, begun.output + repr(begun.exception)
    assert steps(run) == [1, 2] and (run / "model").is_dir()
    resumed = CliRunner().invoke(app, [*settings, "--autoresume"])
    assert resumed.exit_code == 0, resumed.output + repr(resumed.exception)
    assert steps(run) == [1, 2, 3, 4]
    # A restart of another launch than the one that has the run in hand must not touch it.
    monkeypatch.setattr(pipeline, "is_restart", lambda folder: False)
    refused = CliRunner().invoke(app, settings)
    assert "give --resume to go on or --overwrite to start again" in str(refused.exception)
    assert checkpoints(run)[-1][0] == 4


def test_only_the_launch_that_began_a_run_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    mark(tmp_path)
    assert not list(tmp_path.iterdir()) and not is_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    mark(tmp_path)
    assert not is_restart(tmp_path), "the first start"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert is_restart(tmp_path) and not is_restart(tmp_path / "other")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert not is_restart(tmp_path), "its first start was ended before it had the run in hand"
    # Without a rendezvous id every launch is called "none"; the agent tells them apart.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    mark(tmp_path)
    assert is_restart(tmp_path)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not is_restart(tmp_path)


@pytest.mark.slow
def test_killed_ranks_under_torchrun_end_as_unbroken_ones(tmp_path: Path) -> None:
    """``NTPSEG_RANK_KILLS`` sets the number of kills; the first is in the middle of a checkpoint."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    kills = os.environ.get("NTPSEG_RANK_KILLS", "2")
    command = [sys.executable, str(HERE / "elastic_kills.py"), "--kills", kills, "--seed", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == int(kills) and result["runs"][0]["by"]["save"] >= 1
