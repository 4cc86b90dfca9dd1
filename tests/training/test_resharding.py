"""A checkpoint goes on under another number of ranks and another kind of sharding, with an unbroken run's losses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import run
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

PAIRS = (("single", "zero2"), ("single", "ddp"), ("single", "fsdp"), ("zero2", "zero3"), ("zero3", "zero1"))
# The order of sums over ranks differs, and Adam divides by gradients that are nearly zero.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    import resharding_ranks as ranks

    output = tmp_path_factory.mktemp("runs")
    trainer = ranks.make(output / "whole", "plain", 8, 1)
    trainer.train()
    expected = [[line[n] for n in ranks.NAMES] for line in trainer.state.log_history if "loss" in line]
    average = dict(zip(trainer.average.names, trainer.average.weights))
    ranks.write(output / "single", "plain", 8, 1)
    return output, np.array(expected), average, run("resharding_ranks.py", str(output))


def same(figures: list[list[float]], expected: np.ndarray) -> None:
    # The log of the steps before the checkpoint is the writer's.
    assert expected.shape == (6, 8) and (expected[2:, 4] > 0).all(), "hard tokens took part"
    np.testing.assert_allclose(np.array(figures), expected, **CLOSE)


@pytest.mark.parametrize(("saved", "kind"), PAIRS)
def test_two_ranks_go_on(runs, saved: str, kind: str) -> None:
    output, expected, average, log = runs
    figures = json.loads((output / "result.json").read_text())[f"{saved}-{kind}"]
    same(figures, expected)
    if saved == "single" and kind in ("zero2", "ddp"):
        for name, weight in load_file(output / f"{saved}-{kind}.safetensors").items():
            difference = (weight - average[name]).abs()
            assert difference.mean() < 1e-5 and difference.max() < 1e-3, name
    if saved == "zero2":
        assert "checkpoint-3 is of ZeRO-2 on 2 ranks, and goes on under ZeRO-3 on 2 ranks" in log


@pytest.mark.parametrize("saved", ["ddp", "zero2", "zero3", "fsdp"])
def test_one_process_goes_on(runs, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    import resharding_ranks as ranks

    output, expected, _, _ = runs
    checkpoint = output / saved / f"checkpoint-{ranks.STEP}"
    figures = ranks.resume(checkpoint, output / f"{saved}-plain", "plain", 8, 1, average=saved in ("ddp", "zero2"))
    same(figures, expected)
    assert "was epoch" not in capsys.readouterr().err, "a step is the same place in the data"
    assert {path.name for path in checkpoint.parent.iterdir()} == {f"checkpoint-{ranks.STEP}"}, "nothing is left"


def test_what_cannot_be_converted_is_said_in_one_line(runs, tmp_path: Path) -> None:
    import resharding_ranks as ranks

    output, *_ = runs
    checkpoint = output / "zero3" / f"checkpoint-{ranks.STEP}"
    trainer = ranks.make_trainer(ranks.make_toy(14, variants=1), tmp_path, k=3, optim="sgd", **ranks.FIELDS)
    with pytest.raises(ValueError, match=r"of ZeRO-3 on 2 ranks cannot be resumed by one process: only the state of A"):
        trainer.train(str(checkpoint))
    other = ranks.make_trainer(ranks.make_toy(14, variants=1), tmp_path, k=2, **ranks.FIELDS)
    with pytest.raises(
        ValueError,
        match=r"weights of this model, got one whose 'heads\.transform_bias' is \[2, 64\] instead of \[1, 64\]",
    ):
        other.train(str(checkpoint))
    # An optimizer of another model, under a manifest that says that it is whole.
    from ntpseg.utils.manifest import write_manifest

    copy = shutil.copytree(output / "zero2" / f"checkpoint-{ranks.STEP}", tmp_path / "checkpoint-3")
    part = next(copy.glob("global_step*/*zero_pp_rank_1_*_optim_states.pt"))
    state = torch.load(part, weights_only=False)
    state["optimizer_state_dict"]["base_optimizer_state"]["state"][0].pop("exp_avg_sq")
    torch.save(state, part)
    write_manifest(copy)
    trainer = ranks.make(tmp_path / "run", "plain", 8, 1)
    with pytest.raises(ValueError, match="checkpoint must hold AdamW's state of this model") as wrong:
        trainer.train(str(copy))
    assert "\n" not in str(wrong.value) and "resume under the ranks and the stage that wrote it" in str(wrong.value)
