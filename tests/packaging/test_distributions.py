"""The source distribution and the wheel hold what they must, install, and work away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IGNORED = shutil.ignore_patterns(
    ".git", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".venv", ".*_cache", "runs"
)
CHECK = (
    "import sys, torch, ntpseg, ntpseg.ops as ops\n"
    "assert ntpseg.__file__.startswith(sys.argv[1]), ntpseg.__file__\n"
    "assert ops.extension_status().startswith('cpu: native'), ops.extension_status()\n"
    "assert ops.topn_errors(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2).bool(), 1)[1].item() == 1\n"
    "ntpseg.HardTokenMemory(2, 2).advance()\n"
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    settings = {**os.environ, "NTPSEG_SKIP_CUDA": "1", **environment}
    settings.pop("PYTHONPATH", None)
    result = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = tmp_path_factory.mktemp("checkout") / "ntpseg"
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=IGNORED)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", str(checkout / "out"), cwd=checkout)
    return next((checkout / "out").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the source distribution, so that anything missing there shows."""
    folder = sdist.parent
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder)]
    run(sys.executable, "-m", "pip", "wheel", "-q", *options, str(sdist), cwd=folder)
    return next(folder.glob("*.whl"))


def test_source_distribution_holds_sources_and_headers(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder, pattern in (("csrc", "*.*"), ("kernels", "*.py"), ("ntpseg", "*.py")):
        for file in (ROOT / folder).rglob(pattern):
            if "kernels" not in file.relative_to(ROOT).parts[1:] and file.suffix != ".pyc":
                assert str(file.relative_to(ROOT)) in names


@pytest.mark.slow
def test_wheel_serves_every_python(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"ntpseg/_C.abi3.so", "ntpseg/py.typed", "ntpseg/memory/memory.py", "ntpseg/ops/topn.py"} <= names
    assert any(name.startswith("ntpseg/kernels/") for name in names)
    assert not any(name.startswith(("tests/", "csrc/", "kernels/")) for name in names)


@pytest.mark.slow
def test_installs_and_works(wheel: Path, tmp_path: Path) -> None:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    run(sys.executable, "-m", "pip", "install", "-q", *options, str(wheel), cwd=tmp_path)
    script = f"import sys; sys.path.insert(0, sys.argv[1])\n{CHECK}"
    run(sys.executable, "-c", script, str(tmp_path / "site"), cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_forced_cuda_operators_build_whatever_pytorch_is(tmp_path: Path) -> None:
    forced = {"NTPSEG_SKIP_CUDA": "0", "NTPSEG_FORCE_CUDA": "1", "NTPSEG_CUDA_ARCHS": "90a"}
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    run(sys.executable, "setup.py", "-q", "build_ext", *folders, cwd=ROOT, **forced)
    assert {file.name for file in (tmp_path / "lib" / "ntpseg").iterdir()} == {"_C.abi3.so", "_C_cuda.abi3.so"}
