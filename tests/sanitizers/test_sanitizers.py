"""``make sanitize`` can fail: what it runs under reports the faults that were planted, and is quiet without one."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitizer_run", Path(__file__).with_name("run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_planted_faults_are_reported(run: ModuleType, tmp_path: Path) -> None:
    environment, said = run.environment(tmp_path), {}
    for name, command, report in run.plant(tmp_path):
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        said[name] = found.stderr
        assert found.returncode == (run.REPORT if report else 0) and report in found.stderr, found.stderr
    assert not said["no fault"]
    assert "planted_write" in said["a write past an array"] and "planted.cpp" in said["an integer overflow"]


def test_every_listed_test_is_there(run: ModuleType) -> None:
    assert all((run.ROOT / name).exists() for name in [*run.TESTS, *run.LEFT_OUT])


def test_the_build_takes_the_sanitizers(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("ntpseg_setup", run.ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("NTPSEG_SANITIZE", raising=False)
    assert module.sanitizer_flags() == []
    monkeypatch.setenv("NTPSEG_SANITIZE", "address,undefined")
    flags = module.native()["ext_modules"][0]
    for given in (flags.extra_compile_args["cxx"], flags.extra_link_args):
        assert "-fsanitize=address,undefined" in given and "-fno-sanitize-recover=all" in given
