"""``ntpseg bench`` and ``make gpu-check``: finding the suite, and saying what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import ntpseg
from benchmarks import gpu_check
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
    expected = [sys.executable, "-m", "benchmarks", "loss", "--quick", "--threads", "1", "--base", "main"]
    assert seen["command"] == expected
    assert seen["path"].split(os.pathsep)[0] == str(ROOT)


def test_bench_says_where_there_is_no_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ntpseg, "__file__", str(tmp_path / "site-packages" / "ntpseg" / "__init__.py"))
    result = CliRunner().invoke(app, ["bench"])
    assert isinstance(result.exception, ValueError)
    assert "part of a checkout" in str(result.exception) and str(tmp_path) in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_fails_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert "nothing was checked" in capfd.readouterr().err


def test_gpu_check_wants_a_folder_of_wheels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--wheels", str(tmp_path / "none")]) == 2
    assert "must be a folder" in capfd.readouterr().err


def test_wheels_are_unpacked_beside_the_environment(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("peer", "torch"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as file:
            file.writestr(f"{name}_module.py", "value = 7\n")
            file.writestr(f"{name}.pth", "inner\n")
            file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            file.writestr(
                f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            file.writestr(f"{name}-1.0.dist-info/RECORD", "")
    paths = gpu_check.unpack(wheels, tmp_path / "peers")
    assert paths == [str(tmp_path / "peers"), str(tmp_path / "peers" / "inner")]
    assert (tmp_path / "peers" / "peer_module.py").exists()
    assert not (tmp_path / "peers" / "torch_module.py").exists()


def test_a_step_is_stopped_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "print('hello', flush=True); import time; time.sleep(60)"]
    found = gpu_check.step("slow", command, 6.0, dict(os.environ), tmp_path)
    assert found["result"] == "out of time" and found["seconds"] < 30
    assert "hello" in (tmp_path / "slow.log").read_text()
    assert (
        gpu_check.step("bad", [sys.executable, "-c", "raise SystemExit(4)"], 60.0, dict(os.environ), tmp_path)["result"]
        == "failed (4)"
    )
