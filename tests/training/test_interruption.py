"""A scheduler's signal: a checkpoint of the step it comes in, an end without an error, and nothing else is changed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from forked_ranks import run
from test_pipeline import FAST, write_data
from test_resume import figures
from toy import descend, losses, make_toy, make_trainer
from transformers import TrainerCallback
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.training.callbacks import JsonLog
from ntpseg.training.checkpoint import last_checkpoint
from ntpseg.training.interruption import Interruption, TrainingInterrupted


class Send(TrainerCallback):
    """Sends this process a signal at an event of a step."""

    def __init__(self, event: str, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        def send(args, state, control, **kwargs) -> None:
            if state.global_step == step and not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)

        self.sent = False
        setattr(self, event, send)


@pytest.mark.parametrize(
    ("event", "step", "number", "saved"),
    [
        ("on_step_begin", 4, signal.SIGTERM, 5),
        ("on_substep_end", 5, signal.SIGUSR1, 6),  # in the middle of an accumulated step
        ("on_step_end", 4, signal.SIGTERM, 5),  # after the ranks have agreed on this one: the next
        ("on_step_begin", 3, signal.SIGTERM, 4),  # the last step of an epoch
    ],
)
def test_the_run_goes_on_as_if_it_had_not_been_asked(event, step, number, saved, tmp_path) -> None:
    fields = {"num_train_epochs": 3, "gradient_accumulation_steps": 2}
    toy, whole, asked = make_toy(32), tmp_path / "whole", tmp_path / "asked"
    whole.mkdir()
    asked.mkdir()
    expected = make_trainer(toy, whole, callbacks=[JsonLog(whole)], **fields)
    expected.train()
    before = signal.getsignal(number)
    trainer = make_trainer(toy, asked, callbacks=[JsonLog(asked), Send(event, step, number)], **fields)
    with pytest.raises(TrainingInterrupted) as stop:
        trainer.train()
    assert (stop.value.step, stop.value.name) == (saved, number.name)
    assert signal.getsignal(number) is before
    checkpoint = last_checkpoint(asked)
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{saved}"
    resumed = make_trainer(toy, asked, callbacks=[JsonLog(asked)], **fields)
    resumed.train(str(checkpoint))
    assert figures(asked) == figures(whole) and len(figures(whole)) == 12
    for (name, value), other in zip(
        expected.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(("strategy", "step", "saved"), [("epoch", 11, 12), ("steps", 7, 8), ("steps", 11, 12)])
def test_the_evaluation_of_a_signals_step_is_made_up_and_may_be_the_best(strategy, step, saved, tmp_path) -> None:
    fields = {"num_train_epochs": 3, "eval_strategy": strategy, "save_strategy": strategy, "evaluate": True}
    fields |= {"eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    toy, whole, asked = make_toy(16), tmp_path / "whole", tmp_path / "asked"
    expected = make_trainer(toy, whole, **fields)
    descend(expected)
    expected.train()
    trainer = make_trainer(toy, asked, callbacks=[Send("on_step_begin", step)], **fields)
    descend(trainer)
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    resumed = make_trainer(toy, asked, **fields)
    descend(resumed)
    resumed.train(str(asked / f"checkpoint-{saved}"))

    def evaluated(trainer) -> list[int]:
        return [line["step"] for line in trainer.state.log_history if "eval_loss" in line]

    assert evaluated(resumed) == evaluated(expected) == [4, 8, 12]
    assert resumed.state.best_global_step == expected.state.best_global_step == 12
    assert resumed.state.best_model_checkpoint == str(asked / "checkpoint-12")
    for (name, value), other in zip(
        expected.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_a_signal_in_a_skipped_step_still_saves(tmp_path) -> None:
    """The step changed nothing, so its checkpoint is that of the last one that did."""
    trainer = make_trainer(make_toy(32), tmp_path, callbacks=[Send("on_step_begin", 4)], num_train_epochs=3)
    compute = trainer.compute_loss

    def loss_of(model, inputs, *arguments, **options):
        loss = compute(model, inputs, *arguments, **options)
        return loss * float("nan") if trainer.state.global_step == 4 else loss

    trainer.compute_loss = loss_of
    with pytest.raises(TrainingInterrupted) as stop:
        trainer.train()
    assert stop.value.step == 5 and any("skipped" in line for line in trainer.state.log_history)
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name == "checkpoint-5"
    make_trainer(make_toy(32), tmp_path, num_train_epochs=3).train(str(checkpoint))


def test_a_second_signal_acts_as_ever() -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(143)))
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.signal == signal.SIGTERM
            with pytest.raises(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_in_a_thread_leaves_signals_alone(tmp_path) -> None:
    done = []
    trainer = make_trainer(make_toy(4), tmp_path, num_train_epochs=1)
    thread = threading.Thread(target=lambda: done.append(trainer.train()))
    thread.start()
    thread.join(timeout=120)
    assert len(done) == 1 and losses(trainer)


def test_the_command_ends_well_and_says_how_to_go_on(tmp_path, monkeypatch) -> None:
    from ntpseg.training import pipeline

    data, output = write_data(tmp_path / "data"), tmp_path / "run"
    make, send = pipeline.make_trainer, Send("on_step_begin", 1)

    def with_signal(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.add_callback(send)
        return trainer

    monkeypatch.setattr(pipeline, "make_trainer", with_signal)
    settings = ["train", "tiny", f"data.path={data}", f"output={output}", *FAST]
    result = CliRunner().invoke(app, settings)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "stopped by SIGTERM after step 2, checkpoint saved; --resume goes on" in result.output
    assert json.loads((output / "stopped.json").read_text()) == {"signal": "SIGTERM", "step": 2}
    assert not (output / "model").exists()
    result = CliRunner().invoke(app, [*settings, "--resume"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert (output / "model").is_dir() and not (output / "stopped.json").exists()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("ranks")
    run("interrupted_ranks.py", str(output))
    return output


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_ranks_agree_when_one_of_them_is_asked(mode, ranks, tmp_path) -> None:
    asked, resumed = (
        [json.loads((ranks / f"{mode}-{kind}-{rank}.json").read_text()) for rank in (0, 1)]
        for kind in ("asked", "resumed")
    )
    assert [(rank["signal"], rank["step"]) for rank in asked] == [("SIGTERM", 5)] * 2
    # the state of a checkpoint holds the log of the steps before it
    fields = {"num_train_epochs": 3, "per_device_train_batch_size": 8}
    single = make_trainer(make_toy(16, variants=1), tmp_path / "single", k=3, **fields)
    single.train()
    expected = losses(single, "loss", "het")
    assert len(resumed[0]["losses"]) == len(expected) == 6
    torch.testing.assert_close(torch.tensor(resumed[0]["losses"]), torch.tensor(expected), rtol=1e-3, atol=1e-5)
