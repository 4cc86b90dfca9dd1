"""Training by the clock: the learning rate follows the larger fraction, and time ends the run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from toy import make_toy, make_trainer
from transformers import TrainerControl

from ntpseg.training import budget as module
from ntpseg.training.budget import MIN_FACTOR, TimeBudget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def begin(budget: TimeBudget, step: int = 0, steps: int = 100) -> TrainerControl:
    control = TrainerControl()
    budget.on_train_begin(None, SimpleNamespace(global_step=step, max_steps=steps), control)  # type: ignore[arg-type]
    return control


def test_rate_follows_clock_or_steps(clock: Clock) -> None:
    budget = TimeBudget(1.0, warmup_steps=4)
    begin(budget)
    assert budget.factor(0) == pytest.approx(0.25)
    clock.now += 30
    assert budget.factor(10) == pytest.approx(MIN_FACTOR + (1 - MIN_FACTOR) / 2)
    assert budget.factor(100) == pytest.approx(MIN_FACTOR)
    clock.now += 1000
    assert budget.factor(10) == pytest.approx(MIN_FACTOR)


def test_time_ends_training(clock: Clock) -> None:
    budget = TimeBudget(1.0)
    control = begin(budget)
    state = SimpleNamespace(global_step=3, max_steps=100)
    budget.on_step_end(None, state, control)  # type: ignore[arg-type]
    assert not control.should_training_stop
    clock.now += 61
    budget.on_step_end(None, state, control)  # type: ignore[arg-type]
    assert control.should_training_stop


def test_resumed_clock_stands_where_its_steps_were(clock: Clock) -> None:
    budget = TimeBudget(10.0)
    begin(budget, step=25)
    assert budget.fraction(25) == pytest.approx(0.25)


def test_a_checkpoint_keeps_what_was_spent(clock: Clock, tmp_path) -> None:
    """Of a run whose steps are an upper bound: 2 of 100 at the end of its time."""
    budget = TimeBudget(1.0)
    begin(budget)
    clock.now += 57
    rate = budget.factor(60)
    budget.save(tmp_path)
    clock.now += 1000
    resumed = TimeBudget(1.0)
    resumed.load(tmp_path)
    control = begin(resumed, step=2)
    assert not resumed.is_spent
    assert resumed.fraction(2) == pytest.approx(0.95) and resumed.factor(60) == pytest.approx(rate)
    clock.now += 4
    resumed.on_step_end(None, SimpleNamespace(global_step=3, max_steps=100), control)  # type: ignore[arg-type]
    assert control.should_training_stop
    resumed.save(tmp_path)
    resumed.load(tmp_path)
    assert resumed.is_spent
    longer = TimeBudget(2.0)
    longer.load(tmp_path)
    begin(longer, step=3)
    assert not longer.is_spent and longer.fraction(3) == pytest.approx(61 / 120)
    resumed.load(None)
    begin(resumed)
    assert not resumed.is_spent and resumed.fraction(0) == 0.0
    (tmp_path / "budget.json").write_text("{")
    with pytest.raises(ValueError, match=r"budget\.json must say how many seconds were spent, got a damaged file"):
        resumed.load(tmp_path)


def test_a_run_whose_time_is_up_takes_no_step(tmp_path, capsys) -> None:
    toy = make_toy(8)
    options = {"max_steps": 40, "save_strategy": "steps", "save_steps": 1}
    first = make_trainer(toy, tmp_path, trainer_options={"budget": TimeBudget(30.0)}, **options)
    first.budget.started = None
    stop = first.budget.on_step_end

    def spent(args, state, control, **kwargs) -> None:
        if state.global_step == 3:
            first.budget.started -= 3600.0
        stop(args, state, control, **kwargs)

    first.budget.on_step_end = spent  # type: ignore[method-assign]
    first.train()
    assert first.state.global_step == 3
    weights = {name: value.clone() for name, value in first.model.state_dict().items()}
    resumed = make_trainer(toy, tmp_path, trainer_options={"budget": TimeBudget(30.0)}, **options)
    capsys.readouterr()
    resumed.train(str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 3
    assert "no step was left to train: the checkpoint is of step 3, and the minutes of max_minutes were spent" in (
        capsys.readouterr().err
    )
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_scheduler_drives_the_optimizer(clock: Clock) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    budget = TimeBudget(1.0, warmup_steps=1)
    scheduler = budget.scheduler(optimizer, 10)
    begin(budget, steps=10)
    clock.now += 60
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * MIN_FACTOR)


def test_all_ranks_follow_the_first_ones_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that stop at different steps would wait for each other for ever."""
    first = [0.5]
    ranks = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        broadcast=lambda tensor, source: tensor.fill_(first[0]) if source == 0 else None,
    )
    monkeypatch.setattr(module, "dist", ranks)
    budget = TimeBudget(1.0)
    control = begin(budget)
    state = SimpleNamespace(global_step=3, max_steps=100)
    for own, shared in ((59.0, 0.5), (61.0, 0.75)):
        clock.now, first[0] = 100.0 + own, shared
        budget.on_optimizer_step(SimpleNamespace(device="cpu"), state, control)  # type: ignore[arg-type]
        assert budget.fraction(3) == shared
        budget.on_step_end(None, state, control)  # type: ignore[arg-type]
        assert not control.should_training_stop
    first[0] = 1.0
    budget.on_optimizer_step(SimpleNamespace(device="cpu"), state, control)  # type: ignore[arg-type]
    budget.on_step_end(None, state, control)  # type: ignore[arg-type]
    assert control.should_training_stop


def test_refuses_no_time() -> None:
    with pytest.raises(ValueError, match="max_minutes must be a number > 0, got 0"):
        TimeBudget(0)
