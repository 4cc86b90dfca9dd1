"""A run that was killed outright goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from killed_run import RUN
from toy import make_toy, make_trainer

from ntpseg.evaluation.run_directory import training_log
from ntpseg.training.callbacks import JsonLog
from ntpseg.training.checkpoint import drop_incomplete, last_checkpoint

ROOT = Path(__file__).parents[2]


def figures(run: Path) -> list[tuple]:
    names = ("step", "epoch", "loss", "ntp", "nktp", "tcl", "het", "grad_norm", "learning_rate", "token_accuracy")
    return [tuple(line[n] for n in names) for line in training_log(run) if "loss" in line]


def test_kill_and_resume_give_the_unbroken_sequence(tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    script = Path(__file__).with_name("killed_run.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(killed), "8"], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [line[0] for line in figures(killed)] == list(range(1, 9))

    toy = make_toy(16, variants=1)
    make_trainer(toy, whole, callbacks=[JsonLog(whole)], **RUN).train()
    # What a kill in the middle of writing leaves behind: a newer checkpoint that was never finished.
    (killed / "checkpoint-9").mkdir()
    (killed / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": ')
    assert last_checkpoint(killed) == killed / "checkpoint-6"
    assert drop_incomplete(killed) == [killed / "checkpoint-9"]

    trainer = make_trainer(toy, killed, callbacks=[JsonLog(killed)], **RUN)
    trainer.train(resume_from_checkpoint=str(last_checkpoint(killed)))
    assert figures(killed) == figures(whole)
    assert len(figures(whole)) == 12
    assert any(line[6] > 0 for line in figures(whole)), "hard tokens took part"
