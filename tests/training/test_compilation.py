"""``training.torch_compile: auto``: compiled layers are kept where they are quicker, and dropped where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import losses, make_toy, make_trainer

from ntpseg.training import compilation
from ntpseg.training.argument_rules import ACCEPTED
from ntpseg.training.arguments import training_arguments
from ntpseg.training.compilation import CompileWherePays
from ntpseg.training.config import RunConfig

COMPILE = torch.compile


class Clock:
    """Time that only steps take: 1 s, and `compiled` seconds with compiled layers."""

    def __init__(self, compiled: float) -> None:
        self.time, self.compiled, self.calls = 0.0, compiled, 0
        self.callback: Any = None

    def __call__(self) -> float:
        self.calls += 1
        if self.calls % 2 == 0:
            self.time += 1.0 if self.callback._phase == "plain" else self.compiled
        return self.time


def trained(tmp_path: Path, clock: Clock | None, backend: Any, monkeypatch: Any) -> tuple[Any, CompileWherePays | None]:
    monkeypatch.setattr(compilation, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(compilation, "MEASURED", 2)
    monkeypatch.setattr(compilation, "WARM_UP", 1)
    monkeypatch.setattr(torch, "compile", lambda call: COMPILE(call, backend=backend))
    trainer = make_trainer(make_toy(8), tmp_path, num_train_epochs=5)
    callback = None
    if clock is not None:
        callback = clock.callback = CompileWherePays(trainer.model, now=clock)
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize(("seconds", "kept"), [(0.5, True), (0.99, False)])
def test_what_is_quicker_is_kept(
    tmp_path: Path, seconds: float, kept: bool, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    trainer, callback = trained(tmp_path / "auto", Clock(seconds), backend, monkeypatch)
    assert callback is not None and callback.kept is kept
    assert compiled and f"{seconds:.2f} of its time" in capsys.readouterr().err
    plain, _ = trained(tmp_path / "plain", None, backend, monkeypatch)
    assert torch.allclose(torch.tensor(losses(trainer)), torch.tensor(losses(plain)), rtol=1e-4)
    assert all(layer._compiled_call_impl is None for layer in trainer.model.backbone.layers)
    assert list(trainer.model.state_dict()) == list(plain.model.state_dict())


def test_where_it_cannot_be_compiled_training_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler is installed")

    trainer, callback = trained(tmp_path / "auto", Clock(0.5), backend, monkeypatch)
    assert callback is not None and callback.kept is False and "no C++ compiler" in callback.words
    plain, _ = trained(tmp_path / "plain", None, backend, monkeypatch)
    assert losses(trainer) == losses(plain)


def test_a_short_run_is_not_compiled(tmp_path: Path) -> None:
    trainer = make_trainer(make_toy(8), tmp_path, num_train_epochs=5)
    clock = Clock(0.5)
    callback = clock.callback = CompileWherePays(trainer.model, now=clock)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.kept is False and "are left" in callback.words


def test_auto_is_this_programs_and_not_the_trainers(tmp_path: Path) -> None:
    config = RunConfig(training={"torch_compile": "auto"})
    assert training_arguments(config, tmp_path).torch_compile is False
    with pytest.raises(ValueError, match="torch_compile must be auto, true or false, got 'yes'"):
        ACCEPTED["torch_compile"]("torch_compile", "yes")


def test_a_model_and_its_loss_are_one_graph(tmp_path: Path) -> None:
    """Embedding, layers, k heads, negatives and hard tokens."""
    toy = make_toy(2)
    trainer = make_trainer(toy, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    ids = batch.pop("sample_ids")
    supervised = (batch["labels"][0] != -100).nonzero().flatten()
    position = supervised[:3].expand(len(ids), -1).contiguous()
    token = batch["labels"].gather(1, position).flip(0).contiguous()
    found = torch._dynamo.explain(trainer.model)(**batch, het_position=position, het_token=token)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
