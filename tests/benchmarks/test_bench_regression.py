"""``--base``: two revisions in turns, and what counts as slower."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import regression
from benchmarks.command import main
from benchmarks.harness.environment import ROOT
from benchmarks.harness.timing import Budget


class _Fake:
    """A side whose rounds take given times."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.turn = seconds, 0

    def ask(self, command: str, *arguments: Any) -> dict[str, Any]:
        if command == "cases":
            return {"cases": [{"n": 1}], "commit": "abc", "kind": "cpu"}
        if command == "build":
            return {"ready": ["ntpseg"], "missing": {}}
        self.turn += 1
        return {"seconds": [self.seconds[self.turn % len(self.seconds)]]}


@pytest.mark.parametrize(
    ("now", "slower"),
    [([1.2], True), ([1.04], False), ([0.8], False), ([1.0, 1.0, 3.0], False), ([1.3, 0.8, 1.3, 0.8, 1.3], False)],
)
def test_slower_means_beyond_threshold_and_noise(now: list[float], slower: bool) -> None:
    args = argparse.Namespace(only=None, base="main", threshold=0.05)
    budget = Budget(seconds=0.0, min_rounds=11, max_rounds=11, warmup=0)
    (row,) = regression._benchmark("loss", args, [_Fake(now), _Fake([1.0])], budget)  # type: ignore[list-item]
    assert row["slower"] is slower
    assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]


def test_median_interval_narrows() -> None:
    assert regression.median_interval([1.0, 2.0, 3.0]) == (1.0, 2.0, 3.0)
    low, middle, high = regression.median_interval([float(i) for i in range(100)])
    assert (middle, low, high) == (49.5, 40.0, 59.0)


def _is_checkout() -> bool:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD:benchmarks"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not _is_checkout(), reason="not a git checkout")
def test_against_the_last_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NTPSEG_DISABLE_NATIVE", "1")  # or it would build them where csrc differs
    arguments = ["topn", "--quick", "--device", "cpu", "--threads", "1", "--seconds", "0", "--base", "HEAD"]
    # a threshold that no noise reaches: this is about the machinery
    assert main([*arguments, "--threshold", "50", "--results", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "compare-cpu.json").read_text())
    assert {row["name"] for row in rows} >= {"ntpseg plain"}
    assert all(row["base_commit"] for row in rows)
    listed = subprocess.run(["git", "-C", str(ROOT), "worktree", "list"], capture_output=True, text=True).stdout
    assert "ntpseg-base-" not in listed


@pytest.mark.skipif(not _is_checkout(), reason="not a git checkout")
def test_unknown_revision() -> None:
    with pytest.raises(ValueError, match=r"base must be a revision of .*, got 'nowhere'"):
        main(["topn", "--quick", "--device", "cpu", "--base", "nowhere"])
