"""Training by the clock: the learning rate follows the larger fraction, and time ends the run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
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
