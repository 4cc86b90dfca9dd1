"""``predict`` and ``eval`` refuse a model whose weights or output are not finite, in one line and without a mask."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_segmenter import TEXTS, shared
from typer.testing import CliRunner

from ntpseg.cli import app


def spoil(run: Path, file: str, name: str, change) -> None:
    path = run / file
    tensors = load_file(path)
    key = next(key for key in tensors if name in key)
    tensors[key] = change(tensors[key])
    save_file(tensors, path, metadata={"format": "pt"})
    # Of a release whose models have one: what is tested here is not that the file has changed.
    (run / "model" / "manifest.json").unlink(missing_ok=True)


def nan_somewhere(weight: torch.Tensor) -> torch.Tensor:
    weight.view(-1)[-1] = torch.nan
    return weight


CASES = {
    "model": ("model/model.safetensors", "heads", nan_somewhere, "must have finite weights, got nan or inf in"),
    "tokenizer": (
        "model/vision/model.safetensors",
        "mask",
        nan_somewhere,
        "must have finite weights, got nan or inf in",
    ),
    "output": ("model/model.safetensors", "norm.weight", lambda w: w * 1e38, "the model's output must be finite"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["predict", "predict speculatively", "eval"])
def test_no_mask_is_written(tmp_path, case, command) -> None:
    records, _, whole = shared()
    run = shutil.copytree(whole, tmp_path / "run")
    file, name, change, message = CASES[case]
    spoil(run, file, name, change)
    out = tmp_path / "out.png"
    arguments = ["eval", "--model", run, "--text-check", 0]
    if command != "eval":
        arguments = ["predict", "--model", run, "--image", records[0].image, "--text", TEXTS[0], "--out", out]
    if command == "predict speculatively":
        arguments += ["--method", "speculative"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, ValueError), result.output
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert not out.exists() and not (run / "eval").exists()
