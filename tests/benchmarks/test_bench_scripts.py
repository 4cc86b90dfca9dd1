"""The scripts that stand on their own run in a small form, so that none rots (baselines: tests/evaluation)."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import examples
from benchmarks.harness.environment import ROOT


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")


def test_topn_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "topn.json"
    _run(monkeypatch, "topn_cpu.py", "--quick", "--threads", 1, "--output", output)
    found = json.loads(output.read_text())
    assert {row["density"] for row in found["results"]} == {0.02, 0.13, 1.0}
    assert all(row["turns"] >= 11 and row["median"]["ours_us"] > 0 for row in found["results"])


def test_loss_cpu_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this PyTorch has no linear cross-entropy to be compared with")
    output = tmp_path / "gate.json"
    sizes = ("--rows", 64, "--width", 16, "--classes", 128, "--negatives", 2, "--repeats", 2, "--dtype", "float32")
    _run(monkeypatch, "loss_cpu_gate.py", *sizes, "--threads", 1, "--output", output)
    found = json.loads(output.read_text())
    assert found["shape"] == {"R": 64, "D": 16, "V": 128, "m": 2}
    assert found["results"]["float32"]["ratio"]["products"] > 0


def test_figures_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--codes", "300", "--tokens", "16", "--batch", "2", "--steps", "3"]
    monkeypatch.setitem(examples.RUNS, "llamagen_like", ("llamagen_like.py", small))
    examples.main(["--only", "llamagen_like", "--output", str(tmp_path / "found.json")])
    (row,) = json.loads((tmp_path / "found.json").read_text())
    assert row["steps"] == 3 and row["difference"] < 1e-4 and row["commit"] and row["loss_last"] > 0
