"""The average of the weights against a naive loop; applied, given back, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import make_toy, make_trainer

from ntpseg.training.config import OptimizerConfig
from ntpseg.training.ema import WeightAverage
from ntpseg.training.weight_parts import trained_parts


def make() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    return net


def move(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_equals_a_naive_loop(decay: float) -> None:
    """Both sides of the warm-up: step t has min(decay, (1 + t) / (10 + t))."""
    net = make()
    average = WeightAverage(net, decay)
    naive = {n: p.detach().double().clone() for n, p in net.named_parameters() if p.requires_grad}
    for step in range(1, 40):
        move(net)
        average.update(net)
        d = min(decay, (1 + step) / (10 + step))
        for name, parameter in net.named_parameters():
            if name in naive:
                naive[name] = d * naive[name] + (1 - d) * parameter.detach().double()
    assert average.names == list(naive)
    for weight, expected in zip(average.weights, naive.values()):
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-5)


def test_applied_and_restored() -> None:
    net = make()
    average = WeightAverage(net, 0.9)
    move(net)
    average.update(net)
    move(net)
    own = {n: v.clone() for n, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), average.applied(net):
        inside = [p.detach().clone() for p in net.parameters() if p.requires_grad]
        raise RuntimeError("inside")
    for weight, seen in zip(average.weights, inside):
        assert torch.equal(weight, seen)
    for name, value in net.state_dict().items():
        assert torch.equal(value, own[name]), name
    average.copy_to(net)
    assert torch.equal(net[0].weight, average.weights[0]) and not torch.equal(net[0].weight, own["0.weight"])
    assert torch.equal(net[0].bias, own["0.bias"]), "what is frozen is not averaged"
    net(torch.randn(5, 3)).sum().backward()


def test_weights_are_looked_up_where_they_may_have_moved(monkeypatch) -> None:
    """Not in every step, but in the first, and after others were put in their place."""
    net, looked = make(), []

    def counted(model):
        looked.append(model)
        return trained_parts(model)

    monkeypatch.setattr("ntpseg.training.ema.trained_parts", counted)
    average = WeightAverage(net, 0.9)
    # As a first forward pass under FSDP2.
    net[0].weight.data = net[0].weight.data.clone()
    looked.clear()

    def follow(steps: int) -> None:
        for _ in range(steps):
            before = [weight.clone() for weight in average.weights]
            move(net)
            average.update(net)
            decay = min(0.9, (1 + average.steps) / (10 + average.steps))
            for old, new, part in zip(before, average.weights, trained_parts(net), strict=True):
                torch.testing.assert_close(new, decay * old + (1 - decay) * part.tensor)

    follow(3)
    assert len(looked) == 1
    with average.applied(net):
        net[2].weight.data = net[2].weight.data.clone()
    looked.clear()
    follow(3)
    assert len(looked) == 1


def test_begins_with_training(tmp_path) -> None:
    """DeepSpeed moves and divides a model when training begins, after the trainer was made."""
    options = {"optimizer_options": OptimizerConfig(ema=0.5)}
    trainer = make_trainer(make_toy(4), tmp_path, num_train_epochs=1, learning_rate=0.0, trainer_options=options)
    assert trainer.average is None
    model = trainer.model.to(torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    trainer.train()
    assert trainer.average.steps == trainer.state.global_step > 0
    for part, weight in zip(trained_parts(model), trainer.average.weights, strict=True):
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, part.tensor, msg=part.name)


def test_save_and_load(tmp_path) -> None:
    net = make()
    average = WeightAverage(net, 0.9)
    for _ in range(3):
        move(net)
        average.update(net)
    average.save(tmp_path / "checkpoint-3")
    other = WeightAverage(make(), 0.9)
    other.load(tmp_path / "checkpoint-3")
    move(net)
    for one in (average, other):
        one.update(net)
    assert other.steps == average.steps == 4
    for a, b in zip(average.weights, other.weights):
        assert torch.equal(a, b)


def test_wrong_checkpoints_are_named(tmp_path) -> None:
    average = WeightAverage(make(), 0.9)
    with pytest.raises(ValueError, match=r"checkpoint must hold ema\.safetensors for optimizer\.ema above 0, got none"):
        average.load(tmp_path)
    WeightAverage(nn.Linear(3, 4), 0.9).save(tmp_path)
    with pytest.raises(ValueError, match=r"must hold the average of this model, got one that differs in '0.weight'"):
        average.load(tmp_path)
