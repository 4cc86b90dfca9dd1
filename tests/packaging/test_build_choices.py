"""What setup.py decides to build, for each combination of PyTorch, nvcc and the two environment variables."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    for name in ("NTPSEG_SKIP_CUDA", "NTPSEG_FORCE_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("ntpseg_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(folder: Path, release: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.1"\n')
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "variable", "expected"),
    [
        ("13.0", "13.2", None, True),
        ("13.0", None, None, False),
        ("13.0", "12.8", None, False),
        (None, "13.0", None, False),
        (None, None, None, False),
        ("13.0", "13.0", "NTPSEG_SKIP_CUDA", False),
        (None, "13.0", "NTPSEG_FORCE_CUDA", True),
        ("13.0", "12.8", "NTPSEG_FORCE_CUDA", True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*CUDA operators are left out")
def test_cuda_is_built_where_it_can_be_used(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    torch_cuda: str | None,
    nvcc: str | None,
    variable: str | None,
    expected: bool,
) -> None:
    monkeypatch.setenv("PATH", "/bin")
    if nvcc:
        monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, nvcc)))
    if variable:
        monkeypatch.setenv(variable, "1")
    assert build.wants_cuda(torch_cuda) is expected


def test_forcing_without_nvcc_fails(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("NTPSEG_FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match="nvcc must be in CUDA_HOME or on the PATH"):
        build.wants_cuda("13.0")


def test_the_extensions_of_each_choice(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cuda_libraries", lambda nvcc: [])
    for wanted, names in ((False, ["ntpseg._C"]), (True, ["ntpseg._C", "ntpseg._C_cuda"])):
        monkeypatch.setattr(build, "wants_cuda", lambda torch_cuda, wanted=wanted: wanted)
        extensions = build.native()["ext_modules"]
        assert [extension.name for extension in extensions] == names
        assert all((ROOT / source).exists() for extension in extensions for source in extension.sources)


def test_cuda_operators_link_what_they_call(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cuda_libraries", lambda nvcc: [])
    monkeypatch.setattr(build, "wants_cuda", lambda torch_cuda: True)
    for torch_cuda, linked in (("13.0", True), (None, False)):
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        extension = build.native()["ext_modules"][1]
        assert ("torch_cuda" in extension.libraries) is linked


def test_code_for_the_newest_architecture_goes_on_to_later_ones(build: ModuleType) -> None:
    flags = build.gencodes(["80", "90a"])
    assert flags[-1] == "-gencode=arch=compute_90,code=compute_90"
    assert "-gencode=arch=compute_90a,code=sm_90a" in flags
