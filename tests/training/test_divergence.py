"""Losses and gradients that are not finite are named and skipped; training that comes to nothing says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pixel_toy
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import FAST, write_data
from toy import descend, losses, make_toy, make_trainer
from transformers import TrainerCallback
from typer.testing import CliRunner

from ntpseg.cli import app, main
from ntpseg.evaluation.run_directory import training_log
from ntpseg.training.callbacks import JsonLog
from ntpseg.training.checkpoint import checkpoints
from ntpseg.training.divergence import TrainingDiverged

PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


class States(TrainerCallback):
    """What each step finds and leaves: weights, optimizer, average and hard tokens."""

    def __init__(self) -> None:
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.trainer: Any = None

    def snapshot(self) -> list[torch.Tensor]:
        trainer = self.trainer
        tensors = [*trainer.model.parameters()]
        for state in trainer.optimizer.state_dict()["state"].values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
        tensors += trainer.average.weights if trainer.average is not None else []
        if trainer.memory is not None:
            tensors += [v for part in ("served", "recording") for v in trainer.memory.state_dict()[part].values()]
        return [tensor.detach().clone() for tensor in tensors]

    def on_step_begin(self, *args, **kwargs) -> None:
        self.before.append(self.snapshot())

    def on_step_end(self, *args, **kwargs) -> None:
        self.after.append(self.snapshot())

    def unchanged(self) -> list[int]:
        """The steps that changed nothing."""
        pairs = enumerate(zip(self.before, self.after, strict=True), 1)
        return [n for n, (a, b) in pairs if len(a) == len(b) and all(map(torch.equal, a, b))]


def strict(path: Path) -> list[dict]:
    def refuse(token: str) -> None:
        raise AssertionError(f"{path} holds {token}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_broken_sample_costs_its_steps_alone(tmp_path, capsys) -> None:
    """Of an image with a NaN: named by its id and by the parts of the loss; weights, Muon and average stay."""
    cache = pixel_toy.make_cache(tmp_path)
    states = States()
    trainer = pixel_toy.make_trainer(
        cache, tmp_path / "run", callbacks=[states, JsonLog(tmp_path)], save_strategy="steps"
    )
    states.trainer = trainer
    plain = type(trainer.train_dataset).__getitem__

    class Broken(type(trainer.train_dataset)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> dict:
            sample = plain(self, index)
            return {**sample, "image": sample["image"] * np.float32("nan")} if index == 5 else sample

    trainer.train_dataset.__class__ = Broken
    trainer.train()
    skipped = [line for line in trainer.state.log_history if "skipped" in line]
    steps = [line["step"] for line in skipped]
    assert len(steps) == 2 and steps[0] <= 4 < steps[1], "once in each epoch of four steps"
    assert states.unchanged() == steps
    for step, line in zip(steps, skipped):
        assert line["skipped"] == (
            f"step {step} skipped: ntp is nan, nktp is nan, dice is nan, pixel is nan, soft is nan, sample ids 5"
        )
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("ntpseg: ")] == [
        f"ntpseg: {line['skipped']}" for line in skipped
    ]
    lines = [line for line in strict(tmp_path / "trainer_log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if line["loss"] is None] == steps
    assert [line["step"] for line in lines if line["pixel"] is None] == steps
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize(("part", "clipped"), [("loss", 1.0), ("gradient", 1.0), ("gradient", 0.0)])
def test_hard_tokens_of_a_skipped_step_are_not_recorded(tmp_path, part, clipped) -> None:
    states = States()
    options = {"num_train_epochs": 2, "logging_steps": 2, "max_grad_norm": clipped}
    trainer = make_trainer(make_toy(8), tmp_path, callbacks=[states], **options)
    states.trainer = trainer
    calls = []

    def spoil(module, args, output) -> None:
        calls.append(0)
        if len(calls) == 3:
            if part == "loss":
                output.loss = output.loss + torch.inf
            else:
                output.loss.register_hook(lambda gradient: gradient * torch.inf)

    trainer.model.register_forward_hook(spoil)
    trainer.train()
    assert states.unchanged() == [3]
    (line,) = [line for line in trainer.state.log_history if "skipped" in line]
    what = "loss is inf" if part == "loss" else "the gradient is not finite"
    assert line["skipped"].startswith(f"step 3 skipped: {what}, sample ids ")
    assert len(line["skipped"].split("sample ids ")[1].split(", ")) == 4
    # The mean over two steps is that of the one that counted.
    again = make_trainer(make_toy(8), tmp_path, num_train_epochs=2)
    assert all(np.isfinite(losses(trainer)).ravel()) and len(losses(trainer)) == 2
    again.train()
    assert losses(trainer)[0][0] == pytest.approx(np.mean(losses(again)[:2]), rel=1e-6)


def test_training_that_diverges_ends_and_keeps_its_good_checkpoints(tmp_path) -> None:
    trainer = make_trainer(
        make_toy(8),
        tmp_path,
        num_train_epochs=20,
        save_strategy="steps",
        save_steps=1,
        callbacks=[JsonLog(tmp_path)],
        learning_rate=1e30,
        **PLAIN,
    )
    trainer.max_skipped_steps = 3
    with pytest.raises(TrainingDiverged) as error:
        trainer.train()
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("training stopped after 3 skipped steps in a row, the last of them step 4: ")
    assert "lower training.learning_rate" in message and message.endswith("last checkpoint: checkpoint-1")
    # Those of skipped steps would only push out older ones.
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in saved.values())
    lines = strict(tmp_path / "trainer_log.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [2, 3, 4]
    assert [line["loss"] for line in lines if line["step"] in (2, 3) and "loss" in line] == [None, None]


@pytest.mark.parametrize(
    ("strategy", "broken", "left"), [("steps", 4, [2, 4]), ("best", 4, [2, 4]), ("steps", 2, [2, 4])]
)
def test_a_skipped_step_costs_neither_the_best_nor_the_last_checkpoint(tmp_path, strategy, broken, left) -> None:
    """The step is skipped, the weights are good: those of an evaluation that is the best, or of the end."""
    fields = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "evaluate": True}
    fields |= {"save_strategy": strategy, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = make_trainer(make_toy(8), tmp_path, **fields)
    compute = trainer.compute_loss

    def loss_of(model, inputs, *arguments, **options):
        loss = compute(model, inputs, *arguments, **options)
        spoilt = options.get("num_items_in_batch") is not None and trainer.state.global_step == broken - 1
        return loss * float("nan") if spoilt else loss

    trainer.compute_loss = loss_of
    descend(trainer)
    trainer.train()
    assert any("skipped" in line for line in trainer.state.log_history)
    assert [step for step, _ in checkpoints(tmp_path)] == left
    assert trainer.state.best_global_step == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


def test_float16_that_finds_no_scale_is_no_success(tmp_path, monkeypatch) -> None:
    """A loss scaler skips without a word: so many steps in a row are none of its search for a scale."""
    trainer = make_trainer(make_toy(8), tmp_path, max_steps=90)
    skipped = property(lambda self: trainer.state.global_step != 40)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
    with pytest.raises(TrainingDiverged, match="stopped after 40 steps in a row, the last of them step 80, whose grad"):
        trainer.train()


def test_weights_that_are_not_finite_are_never_saved(tmp_path) -> None:
    trainer = make_trainer(make_toy(8), tmp_path, max_steps=2, save_strategy="steps", save_steps=1)

    class Spoil(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs) -> None:
            with torch.no_grad():
                trainer.model.heads.weight[3, 3] = torch.inf

    trainer.add_callback(Spoil())
    with pytest.raises(TrainingDiverged, match=r"checkpoint-1 must have finite weights, got nan or inf in .*; lower"):
        trainer.train()
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(TrainingDiverged, match="the model must have finite weights"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_training_without_a_step_is_no_success(tmp_path) -> None:
    with pytest.raises(ValueError, match="training must take at least one step, got none"):
        make_trainer(make_toy(4), tmp_path, num_train_epochs=0).train()
    with pytest.raises(ValueError, match="training must have at least one batch, got 3 samples for batches of 4 on 1"):
        make_trainer(make_toy(3), tmp_path, dataloader_drop_last=True).train()


def test_training_without_a_rate_is_no_silent_success(tmp_path, capsys) -> None:
    make_trainer(make_toy(4), tmp_path, max_steps=1, warmup_steps=1).train()
    assert "ntpseg: every step had a learning rate of 0: the weights are those of the start" in capsys.readouterr().err


def test_training_without_a_supervised_label_is_no_success(tmp_path) -> None:
    trainer = make_trainer(make_toy(4), tmp_path, num_train_epochs=9)
    collate = trainer.data_collator

    def without_labels(samples: list) -> dict:
        batch = collate(samples)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    trainer.data_collator = without_labels
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(
        TrainingDiverged, match=r"after 5 skipped steps in a row.*no label of its samples is supervised"
    ):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters())), "not even the weights' decay"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "discs")


@pytest.mark.parametrize("steps", [1, 30], ids=["too few steps to notice", "many steps"])
def test_the_command_ends_in_one_line_and_without_a_model(data, tmp_path, monkeypatch, capsys, steps) -> None:
    run = tmp_path / "run"
    settings = [
        "training.learning_rate=1e30",
        "training.max_grad_norm=0",
        f"training.max_steps={steps}",
        "training.warmup_steps=0",
    ]
    arguments = ["ntpseg", "train", "tiny", f"data.path={data}", f"output={run}", *FAST, *settings]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ntpseg: " + ("training stopped after 5" if steps > 1 else "the trained model must have"))
    assert "lower training.learning_rate" in last
    assert not (run / "model").exists() and not (run / "model.part").exists()
    assert all(line["loss"] != 0 for line in strict(run / "trainer_log.jsonl") if "loss" in line)
    assert training_log(run)


def test_a_vision_tokenizer_that_diverges_is_not_saved(data, tmp_path) -> None:
    run = tmp_path / "run"
    arguments = [f"data.path={data}", f"output={run}", *FAST, "vision.learning_rate=1e30"]
    result = CliRunner().invoke(app, ["train", "tiny", *arguments])
    assert isinstance(result.exception, ValueError)
    message = str(result.exception)
    assert "the vision tokenizer must decode finite pixels after its training" in message
    assert message.endswith("lower vision.learning_rate (1e+30)")
    assert not list(run.rglob("*.safetensors"))


def test_a_clock_too_short_says_so(data, tmp_path) -> None:
    """One step is always taken; a model of less than an epoch is no silent success."""
    arguments = [f"data.path={data}", f"output={tmp_path / 'run'}", *FAST, "max_minutes=1e-6"]
    result = CliRunner().invoke(app, ["train", "tiny", *arguments])
    assert result.exit_code == 0, result.output
    assert "max_minutes ended training after step 1 of 4, before every sample was seen once" in result.output
