"""Two ranks over gloo: DDP, ZeRO-2 and ZeRO-3 train exactly as one process with the same global batch does."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from forked_ranks import run
from toy import make_toy, make_trainer

from ntpseg.models import NTPSegModel

NAMES = ("loss", "ntp", "nktp", "tcl", "het", "grad_norm", "token_accuracy")

MODES = ("ddp", "zero2", "zero3", "ddp+", "zero2+", "zero3+")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    trainer = make_trainer(
        make_toy(16, variants=1),
        tmp_path_factory.mktemp("single"),
        k=3,
        num_train_epochs=3,
        per_device_train_batch_size=8,
    )
    trainer.train()
    result = [[line[n] for n in NAMES] for line in trainer.state.log_history if "loss" in line]
    return np.array(result), trainer.model


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("ranks")
    run("two_ranks.py", str(output), *MODES)
    return json.loads((output / "result.json").read_text()), output


@pytest.mark.parametrize("mode", MODES)
def test_ranks_equal_one_process(single, ranks, mode) -> None:
    """Every part of the loss at every step; HET from the second epoch on shows that the ranks share their memories.

    With ``+`` on packed rows and with activation checkpointing, which change nothing.
    """
    expected, _ = single
    result = np.array(ranks[0][mode])
    assert expected.shape == (6, len(NAMES)) and (expected[2:, NAMES.index("het")] > 0).all()
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-5)


def test_zero3_saves_the_whole_model(single, ranks) -> None:
    saved = NTPSegModel.from_pretrained(ranks[1] / "zero3" / "model")
    for (name, one), two in zip(single[1].named_parameters(), saved.parameters()):
        # Adam divides by the size of each gradient: where that is nearly zero, rounding decides the direction.
        difference = (one - two).abs()
        assert difference.mean() < 1e-4 and torch.quantile(difference.flatten(), 0.99) < 1e-3, name


def test_zero3_resumes(ranks) -> None:
    """From the middle of an epoch, where each rank has recorded other hard tokens."""
    result = ranks[0]
    np.testing.assert_allclose(np.array(result["resumed"])[3:], np.array(result["zero3"])[3:], rtol=1e-4, atol=1e-6)
