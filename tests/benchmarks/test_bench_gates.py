"""What the CPU paths promise, gradient filtering on a trained run, and what the examples measure, in a small form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import examples, loss, suite
from benchmarks.command import main
from benchmarks.harness.rows import read
from benchmarks.operands import Shape
from benchmarks.report import write_report

GATE = ["--gate", "--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_ranking(tmp_path: Path) -> None:
    arguments = ["topn", *GATE, "--seconds", "0.2", "--where", "B=8", "T=256", "n=16", "--results", str(tmp_path)]
    assert main(arguments) == 0
    rows = [row for row in read(tmp_path) if row["contestant"] == "ntpseg native"]
    assert {row["case"]["errors"] for row in rows} == {0.02, 0.13, 1.0}
    assert all(row["seconds"]["rounds"] >= 11 and row["seconds"]["median"] > 0 for row in rows if "seconds" in row)
    assert all(row["limits"]["where + topk"]["median"] > 0 for row in rows if "seconds" in row)
    assert list(tmp_path.glob("topn-cpu-*-gate-threads1.json"))  # a run with other threads has a file of its own
    assert write_report(tmp_path, tmp_path / "docs.md").exists()
    (page,) = (tmp_path / "docs").iterdir()
    assert not rows or "seconds" not in rows[0] or "| topn, float32, threads 1 | where + topk | 3 |" in page.read_text()


def test_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this PyTorch has no linear cross-entropy to be compared with")
    shapes = [Shape(1024, 16, 128, 1, 2, dtype=dtype) for dtype in ("float32", "bfloat16")]
    monkeypatch.setattr(loss, "shapes", lambda device, grid: shapes)
    monkeypatch.setattr(suite, "matmul_flops", lambda device, dtype: 1e9)  # slow in bfloat16 on some processors
    assert main(["loss", *GATE, "--clock", "cpu", "--seconds", "0", "--results", str(tmp_path)]) == 0
    rows = {(row["contestant"], row["case"]["dtype"]): row for row in read(tmp_path)}
    row = rows["ntpseg torch", "float32"]
    assert row["case"] == {"R": 1024, "D": 16, "V": 128, "k": 1, "m": 2, "logits": "random", "dtype": "float32"}
    assert row["timing"] == "process_time"
    assert row["limits"]["three products"]["median"] > 0
    assert set(row["limits"]) >= {"three products", "torch linear_cross_entropy"}
    assert ("three products in float32", "float32") not in rows
    assert rows["three products in float32", "bfloat16"]["seconds"]["median"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--gate"], "benchmark must be one of loss, topn with --gate, got decode"),
        (["topn", "--run", "nowhere"], "benchmark must be loss with --run, got topn"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments)


def test_figures_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--codes", "300", "--tokens", "16", "--batch", "2", "--steps", "3"]
    monkeypatch.setitem(examples.RUNS, "llamagen_like", ("llamagen_like.py", small))
    examples.main(["--only", "llamagen_like", "--output", str(tmp_path / "figures.json")])
    (row,) = json.loads((tmp_path / "figures.json").read_text())
    assert row["steps"] == 3 and row["difference"] < 1e-4 and row["commit"] and row["loss_last"] > 0
