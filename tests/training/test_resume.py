"""A run that was killed outright goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killed_run import RUN
from toy import make_toy, make_trainer
from transformers import TrainerCallback

from ntpseg.evaluation.run_directory import training_log
from ntpseg.training.callbacks import JsonLog
from ntpseg.training.checkpoint import drop_incomplete, last_checkpoint

ROOT = Path(__file__).parents[2]

# What a log says of speed: figures of this machine at this hour.
TIMES = ("runtime", "_second", "_seconds", "mfu", "_gib", "_share")


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


class Cut(TrainerCallback):
    """Ends the program, as a kill would, where `event` comes at step `step`."""

    def __init__(self, event: str, step: int) -> None:
        def cut(args, state, control, **kwargs) -> None:
            if state.global_step == step:
                raise InterruptedError

        setattr(self, event, cut)


@pytest.mark.parametrize(
    ("event", "step"),
    [("on_save", 4), ("on_save", 12), ("on_prediction_step", 8), ("on_evaluate", 4), ("on_evaluate", 12)],
)
def test_an_evaluation_that_a_kill_cut_off_is_made_up_once(tmp_path, event, step) -> None:
    """Killed after the checkpoint of an epoch's last step, before, in and after the evaluation of that epoch."""
    fields = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch"}
    fields |= {"evaluate": True, "hard_tokens": 0}
    toy = make_toy(16, variants=1)
    for run in (tmp_path / "whole", tmp_path / "cut"):
        run.mkdir()
        cut = [Cut(event, step)] if run.name == "cut" else []
        trainer = make_trainer(toy, run, callbacks=[JsonLog(run), *cut], **fields)
        if cut:
            with pytest.raises(InterruptedError):
                trainer.train()
            assert last_checkpoint(run) == run / f"checkpoint-{step}"
            trainer = make_trainer(toy, run, callbacks=[JsonLog(run)], **fields)
            trainer.train(True)
        else:
            trainer.train()
    logs = [
        [
            {name: value for name, value in line.items() if not name.endswith(TIMES)}
            for line in training_log(tmp_path / name)
            if "loss" in line or "eval_loss" in line
        ]
        for name in ("whole", "cut")
    ]
    assert logs[1] == logs[0]
    assert [line["step"] for line in logs[0] if "eval_loss" in line] == [4, 8, 12]
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [4, 8, 12]
