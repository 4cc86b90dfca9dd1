"""Training with a stem: accumulation, an average of the weights, and a killed run that goes on to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_run import RUN
from pixel_toy import MASK_INPUTS, MUON, make_cache, make_trainer
from toy import losses

from ntpseg.evaluation.run_directory import training_log
from ntpseg.training.callbacks import JsonLog
from ntpseg.training.checkpoint import last_checkpoint
from ntpseg.training.config import OptimizerConfig

TERMS = ("loss", "ntp", "dice", "pixel", "soft", "token_accuracy")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("pixels"))


def test_accumulation_equals_a_large_batch(cache, tmp_path) -> None:
    """Captions of different lengths, and a last batch that is not full."""
    runs = []
    for batch, times in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            cache,
            tmp_path,
            optimizer=OptimizerConfig(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=times,
            max_grad_norm=1e9,
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
        )
        trainer.train()
        runs.append((losses(trainer, *TERMS), torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    assert len(runs[0][0]) == 8
    for other, weights in runs[1:]:
        np.testing.assert_allclose(np.array(other), np.array(runs[0][0]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights, runs[0][1], rtol=1e-3, atol=1e-5)


def test_parts_add_up(cache, tmp_path) -> None:
    trainer = make_trainer(cache, tmp_path, mask_inputs=MASK_INPUTS)
    trainer.train()
    table = np.array(losses(trainer, *TERMS))
    np.testing.assert_allclose(
        table[:, 0], table[:, 1] + 0.5 * table[:, 2] + table[:, 3] + 0.25 * table[:, 4], rtol=1e-4
    )
    assert (table[:, 1:5] > 0).all()
    assert table[-1, 0] < table[0, 0]


def test_the_average_is_evaluated_and_the_weights_given_back(cache, tmp_path) -> None:
    trainer = make_trainer(cache, tmp_path, evaluate=True)
    trainer.train()
    assert trainer.average is not None and trainer.average.steps == 8
    own = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    averaged = trainer.evaluate()["eval_loss"]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, own[name]), name
    last = trainer.average
    trainer.average = None
    plain = trainer.evaluate()["eval_loss"]
    assert averaged != plain
    last.copy_to(trainer.model)
    assert trainer.evaluate()["eval_loss"] == averaged


def figures(run: Path) -> list[tuple]:
    names = ("step", "epoch", *TERMS, "grad_norm", "learning_rate")
    return [tuple(line[n] for n in names) for line in training_log(run) if "loss" in line]


def test_kill_and_resume_give_the_unbroken_sequence(cache, tmp_path) -> None:
    """With Muon, the average, augmentation, and drafts and noise drawn in the middle of an epoch."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    script = Path(__file__).with_name("killed_run.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(killed), "8", str(cache.directory), cache.key]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [line[0] for line in figures(killed)] == list(range(1, 9))

    unbroken = make_trainer(cache, whole, mask_inputs=MASK_INPUTS, callbacks=[JsonLog(whole)], **RUN)
    unbroken.train()
    assert last_checkpoint(killed) == killed / "checkpoint-6"
    trainer = make_trainer(cache, killed, mask_inputs=MASK_INPUTS, callbacks=[JsonLog(killed)], **RUN)
    trainer.train(resume_from_checkpoint=str(last_checkpoint(killed)))
    assert figures(killed) == figures(whole)
    assert len(figures(whole)) == 12
    for name, one, two in zip(unbroken.average.names, unbroken.average.weights, trainer.average.weights, strict=True):
        assert torch.equal(one, two), name


def test_a_checkpoint_without_an_average_is_refused(cache, tmp_path) -> None:
    trainer = make_trainer(
        cache, tmp_path, optimizer=OptimizerConfig(), max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    other = make_trainer(cache, tmp_path, optimizer=MUON, max_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint must hold ema\.safetensors .* got none"):
        other.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
