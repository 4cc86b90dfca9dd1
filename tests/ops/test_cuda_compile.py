"""nvcc compiles the kernels for every architecture that is shipped, without a spill and within a block's limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHS = ["80", "90a", "100"]
STATIC_SHARED_LIMIT = 48 * 1024
REGISTERS_PER_SM = 65536

Usage = dict[str, dict[str, int]]


def resource_usage(log: str) -> dict[str, Usage]:
    """Parse ``ptxas -v``: architecture -> kernel -> figures."""
    usage: dict[str, Usage] = defaultdict(dict)
    figures: dict[str, int] = {}
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            name = re.search(r"(topn|record)_kernelILi(\d+)ELi(\d+)E", match[1])
            assert name, match[1]
            figures = usage[match[2]]["{} {} threads x {}".format(*name.groups())] = {"threads": int(name[2])}
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            figures.update(zip(("stack", "spill_stores", "spill_loads"), map(int, match.groups())))
        elif match := re.search(r"Used (\d+) registers.*?(\d+) bytes smem", line):
            figures.update(registers=int(match[1]), shared=int(match[2]))
    return usage


@pytest.fixture(scope="module")
def usage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Usage]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    output = tmp_path_factory.mktemp("nvcc") / "topn.o"
    gencodes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    # The folder of the file is all that is on the include path: the kernels need no torch header.
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-Werror", "all-warnings", *gencodes]
    command = [nvcc, *flags, "-c", str(CUDA / "topn.cu"), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return resource_usage(result.stdout + result.stderr)


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_fit(usage: dict[str, Usage], arch: str) -> None:
    kernels = usage[arch]
    assert len(kernels) == 12
    for name, figures in sorted(kernels.items()):
        print(f"sm_{arch} {name}: {figures['registers']} registers, {figures['shared']} bytes of shared memory")
        assert (figures["stack"], figures["spill_stores"], figures["spill_loads"]) == (0, 0, 0), name
        assert figures["shared"] <= STATIC_SHARED_LIMIT, name
        # Two blocks on a multiprocessor at least where blocks are small enough to choose.
        blocks = 1 if figures["threads"] == 1024 else 2
        assert figures["registers"] * figures["threads"] * blocks <= REGISTERS_PER_SM, name


def test_no_torch_header_is_included() -> None:
    for file in CUDA.glob("*.cu*"):
        assert "torch" not in re.sub(r"//.*", "", file.read_text()), file
