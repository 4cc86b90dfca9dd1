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


def _wheel(folder: Path, name: str, tag: str = "py3-none-any", **files: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as file:
        for path, text in files.items():
            file.writestr(path.replace("__", "/").replace("_dot_", "."), text)
        file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{name}-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_wheels_are_unpacked_beside_the_environment(tmp_path: Path) -> None:
    wheels, peers = tmp_path / "wheels", tmp_path / "peers"
    for name in ("peer", "torch", "sympy"):  # the last is a requirement of PyTorch's
        _wheel(wheels, name, **{f"{name}_module_dot_py": "value = 7\n"})
    _wheel(wheels, "paths", paths_dot_pth="inner\n", inner__inner_module_dot_py="")
    # nvidia-cutlass-dsl adds its folder by a line of code, which PYTHONPATH alone would never run
    code = "import sys, os, outer; sys.path.insert(0, os.path.join(outer.__path__[0], 'packages'))\n"
    _wheel(wheels, "code", code_dot_pth=code, outer__packages__cute_module_dot_py="")
    paths = gpu_check.unpack(wheels, peers)
    peers /= "site-packages"
    assert set(paths) == {str(peers), str(peers / "inner"), str(peers / "outer" / "packages")}
    assert paths[0] == str(peers)
    assert (peers / "peer_module.py").exists()
    assert not (peers / "torch_module.py").exists() and not (peers / "sympy_module.py").exists()


def test_a_wheel_for_another_machine_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wheels, peers = tmp_path / "wheels", tmp_path / "peers"
    _wheel(wheels, "peer", peer_module_dot_py="")
    _wheel(wheels, "other", "cp27-cp27m-win32", other_module_dot_py="")
    assert gpu_check.unpack(wheels, peers) == [str(peers / "site-packages")]
    peers /= "site-packages"
    assert (peers / "peer_module.py").exists() and not (peers / "other_module.py").exists()
    assert "left out" in capfd.readouterr().err


def test_no_wheels_is_no_path(tmp_path: Path) -> None:
    assert gpu_check.unpack(tmp_path, tmp_path / "peers") == []


@pytest.mark.parametrize("built", [True, False])
def test_the_steps_share_ten_minutes(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", ROOT if built else ROOT / "nowhere")
    steps = [step for step in gpu_check.steps({}) if step[0] != "build" or not built]
    names = [name for name, _, _ in steps]
    assert names[-1] == "report" and names.index("tests") < names.index("loss") < names.index("profile")
    if built:  # 15 seconds for starting and unpacking
        assert sum(limit for _, limit, _ in steps) + 15 <= gpu_check.BUDGET < 600
    left = gpu_check.BUDGET - 15
    for index, (_, limit, _) in enumerate(steps):  # every step takes all that it may
        share = gpu_check.time_limit(steps[index:], left)
        assert share >= (limit * 0.999 if built else limit * 0.75)
        left -= share
    assert left == pytest.approx(0, abs=1e-6)
    quick = gpu_check.time_limit(steps[2:], gpu_check.BUDGET - 30)  # the first two were fast: the others get their time
    assert quick > steps[2][1]


def test_a_step_is_stopped_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "print('hello', flush=True); import time; time.sleep(60)"]
    result = gpu_check.run_step("slow", command, 6.0, dict(os.environ), tmp_path)
    assert result["result"] == "out of time" and result["seconds"] < 30
    assert "hello" in (tmp_path / "slow.log").read_text()
    command = [sys.executable, "-c", "raise SystemExit(4)"]
    assert gpu_check.run_step("bad", command, 60.0, dict(os.environ), tmp_path)["result"] == "failed (4)"
