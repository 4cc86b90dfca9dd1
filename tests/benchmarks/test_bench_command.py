"""``ntpseg bench`` and ``make gpu-check``: finding the suite, and saying what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import ntpseg
from ntpseg.cli import app

ROOT = Path(ntpseg.__file__).resolve().parents[1]


def test_bench_runs_the_suite_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        seen.update(command=command, path=env["PYTHONPATH"])
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    result = CliRunner().invoke(app, ["bench", "loss", "--quick", "--threads", "1", "--base", "main"])
    assert result.exit_code == 3
    expected = [sys.executable, "-m", "benchmarks", "loss", "--threads", "1", "--quick", "--base", "main"]
    assert seen["command"] == expected
    assert seen["path"].split(os.pathsep)[0] == str(ROOT)


def test_bench_says_where_there_is_no_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ntpseg, "__file__", str(tmp_path / "site-packages" / "ntpseg" / "__init__.py"))
    result = CliRunner().invoke(app, ["bench"])
    assert isinstance(result.exception, ValueError)
    assert "part of a checkout" in str(result.exception) and str(tmp_path) in str(result.exception)
