"""A resumed run has the settings that it is given, not those of its checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from toy import losses, make_toy, make_trainer

from ntpseg.training.checkpoint import checkpoints
from ntpseg.training.config import OptimizerConfig
from ntpseg.training.resumed_settings import OptimizerSettings

FIELDS = {"num_train_epochs": 4, "lr_scheduler_type": "linear", "hard_tokens": 0}


def optimizer_of(rate: float, decay: float) -> torch.optim.AdamW:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": parameters[:1], "weight_decay": decay}, {"params": parameters[1:], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_its_own_rate_decay_betas_and_intervals(tmp_path, capsys, optimizer) -> None:
    toy, options = make_toy(16), {"trainer_options": {"optimizer_options": OptimizerConfig(name=optimizer)}}
    make_trainer(toy, tmp_path, max_steps=4, save_strategy="steps", save_steps=4, **options, **FIELDS).train()
    checkpoint = tmp_path / "checkpoint-4"
    changed = {"learning_rate": 5e-4, "weight_decay": 0.3, "adam_beta2": 0.5, "save_steps": 2, "logging_steps": 2}
    changed |= {"max_steps": 8, "save_strategy": "steps"}
    resumed = make_trainer(toy, tmp_path, **options, **FIELDS, **changed)
    resumed.train(str(checkpoint))
    groups = resumed.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert all(tuple(group["betas"]) == (0.9, 0.5) for group in groups)
    rates = [rate for (rate,) in losses(resumed, "learning_rate")]
    # Linear over 8 steps, of which the logs are of the 6th and the 8th. The first group is Muon's, where that is used.
    first = 5e-4 if optimizer == "adamw" else OptimizerConfig().muon_learning_rate
    assert rates[-2:] == pytest.approx([first * 3 / 8, first * 1 / 8])
    assert groups[-1]["initial_lr"] == 5e-4 and resumed.lr_scheduler.base_lrs[-1] == 5e-4
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6, 8]
    assert [line["step"] for line in resumed.state.log_history if "loss" in line][-2:] == [6, 8]
    said = capsys.readouterr().err
    assert "resumed with other settings: " in said and "learning rate 0.002 -> 0.0005" in said
    if optimizer == "muon":
        assert groups[0]["initial_lr"] == OptimizerConfig().muon_learning_rate


def test_nothing_is_said_where_nothing_has_changed(tmp_path, capsys) -> None:
    toy = make_toy(16)
    make_trainer(toy, tmp_path, max_steps=2, save_strategy="steps", save_steps=2, **FIELDS).train()
    make_trainer(toy, tmp_path, max_steps=4, **FIELDS).train(str(tmp_path / "checkpoint-2"))
    assert "other settings" not in capsys.readouterr().err


@pytest.mark.parametrize("step", [0, 3])
def test_a_rate_keeps_its_place_in_the_schedule(step) -> None:
    def factor(done: int) -> float:
        return done / 8

    before = optimizer_of(1e-2, 0.1)
    schedule = LambdaLR(before, factor)
    for _ in range(step):
        before.step()
        schedule.step()
    state = before.state_dict(), schedule.state_dict()
    now = optimizer_of(1e-3, 0.2)
    settings, follow = OptimizerSettings(now), LambdaLR(now, factor)
    now.load_state_dict(state[0])
    follow.load_state_dict(state[1])
    assert settings.restore(now, follow) == ["weight_decay 0.1 -> 0.2", "learning rate 0.01 -> 0.001"]
    assert [group["lr"] for group in now.param_groups] == pytest.approx([1e-3 * step / 8] * 2)
    now.step()
    follow.step()
    assert [group["lr"] for group in now.param_groups] == pytest.approx([1e-3 * (step + 1) / 8] * 2)
    assert settings.restore(now, follow) == []


def test_an_optimizer_of_deepspeeds_json_file_is_left_to_it(tmp_path) -> None:
    from accelerate.utils import DummyOptim

    trainer = make_trainer(make_toy(4), tmp_path)
    trainer.optimizer = DummyOptim(trainer.model.parameters())
    assert trainer.create_optimizer() is trainer.optimizer


def test_a_schedule_without_base_rates_keeps_the_checkpoints() -> None:
    optimizer = optimizer_of(1e-2, 0.1)
    settings = OptimizerSettings(optimizer)
    plateau = ReduceLROnPlateau(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3
    assert settings.restore(optimizer, plateau) == []
    assert optimizer.param_groups[0]["lr"] == 5e-3
