"""Two ranks equal one process whatever the number of samples: what fills up a rank's last batch counts nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run
from safetensors.torch import load_file
from uneven_ranks import BROKEN, SIZES, alone

MODES = ["ddp", "dense", "nan"]
if importlib.util.find_spec("deepspeed") is not None:
    MODES += ["zero2", "zero3"]
CASES = [(mode, pairs) for mode in MODES for pairs in SIZES[mode]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], dict[Any, Any], Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run("uneven_ranks.py", str(two), *MODES)
    return alone(one, MODES), torch.load(two / "result.pt", weights_only=True), one, two


@pytest.mark.parametrize(("mode", "pairs"), CASES)
def test_logs_weights_and_hard_tokens(results, mode: str, pairs: int) -> None:
    """Each training line (loss, terms, norm, accuracy) and each evaluation's, to 1e-6; every hard token alike.

    A NaN on one rank alone is named by all, and they skip its step together.
    """
    one, two, first, second = results
    expected, got = one[mode, pairs], two[mode, pairs]
    assert len(got["log"]) == len(expected["log"])
    lines = [line for line in expected["log"] if "loss" in line]
    assert len([line for line in expected["log"] if "eval_loss" in line]) == 3
    assert all(line["het"] is None or line["het"] > 0 for line in lines if line["epoch"] > 1)
    skipped = [line["skipped"] for line in expected["log"] if "skipped" in line]
    assert [line["loss"] for line in lines].count(None) == len(skipped) == (0 if mode in ("ddp", "dense") else 3)
    assert all(message.endswith(f"skipped: loss is nan, sample ids {BROKEN}") for message in skipped)
    for line, other in zip(expected["log"], got["log"], strict=True):
        # The Trainer's own mean of the run is no figure of ours; only several ranks exchange anything.
        apart = ("train_loss", "het_sent_mb", "het_wait_seconds")
        line, other = ({k: v for k, v in x.items() if k not in apart} for x in (line, other))
        assert other.pop("skipped", None) == line.pop("skipped", None)
        assert [k for k, v in other.items() if v is None] == [k for k, v in line.items() if v is None]
        line, other = ({k: v for k, v in x.items() if v is not None} for x in (line, other))
        assert other == pytest.approx(line, rel=1e-6, abs=1e-6), line
    same = "nan" if mode.startswith("zero") else mode
    weights = load_file(first / f"{same}-{pairs}/model/model.safetensors")
    others = load_file(second / f"{mode}-{pairs}/model/model.safetensors")
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(others[key], weight, rtol=0, atol=1e-6, msg=key)
    # Of the last epoch, which nothing follows, each rank still holds its own part.
    for key, value in expected["memory"]["served"].items():
        torch.testing.assert_close(got["memory"]["served"][key], value, rtol=1e-4, atol=1e-5, msg=key)
