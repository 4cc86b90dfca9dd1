"""Compiles, into ``TRITON_CACHE_DIR``, the kernels that the checks launch: ``python -m benchmarks.gpu_check.warm 90``.

A process of its own, without Triton's interpreter. The launches come from the chunk loop and what is around it, as
`tests/kernels/compile_ahead.py` runs them, and from the candidates of `benchmarks.tune`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from benchmarks.harness.environment import ROOT
from benchmarks.tune import CANDIDATES
from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, GemmConfig
from ntpseg.kernels.workspace import Anchors, BlockStats


class PretendedDriver(nvidia.CudaDriver):
    """Triton's CUDA driver without a device: it names one, and nothing is ever launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self.target


class Counter:
    """Replaces `JITFunction.run` by compiling alone, and counts what is new."""

    def __init__(self) -> None:
        self.kernels: dict[str, Any] = {}
        self.launchers = 0
        self.failed: list[str] = []
        self.compile = JITFunction.run

    def __enter__(self) -> Counter:
        counter = self

        def run(kernel: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
            counter.take(kernel, args, kwargs)

        JITFunction.run = run
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self.compile

    def take(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compiles one launch, and its launcher where that can be."""
        try:
            compiled = self.compile(kernel, *args, grid=(1,), warmup=True, **kwargs)
        except Exception as error:  # a candidate that the compiler refuses is left to the device to refuse
            self.failed.append(f"{kernel.__name__}: {type(error).__name__}: {str(error)[:200]}")
            return
        if compiled is None or compiled.hash in self.kernels:
            return
        self.kernels[compiled.hash] = compiled
        if hasattr(nvidia, "make_launcher"):  # later releases have one for all kernels
            # built and kept in the cache, but not to be loaded here: the driver's functions are missing
            with contextlib.suppress(ImportError):
                nvidia.CudaLauncher(compiled.src, compiled.metadata)
            self.launchers += 1


def stub_libcuda(folder: Path) -> None:
    """A libcuda without content, for the linker: Triton's launchers find the real one's functions when they run."""
    source = folder / "stub.c"
    source.write_text("int ntpseg_stub_of_libcuda;\n")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    library = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)], check=True
    )
    nvidia.libcuda_dirs.cache_clear()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


def launch_everything(capability: int) -> None:
    """Every launch that is to be compiled."""
    architecture = f"sm_{capability}"
    path = ROOT / "tests" / "kernels" / "compile_ahead.py"
    spec = importlib.util.spec_from_file_location("compile_ahead", path)
    assert spec is not None and spec.loader is not None
    ahead = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ahead)
    os.environ.pop("TRITON_DEFAULT_FP_FUSION", None)  # part of the key; the checks do not set it
    for config in (GEMM_CONFIGS[architecture].forward, *CANDIDATES[architecture]):
        launch_candidate(config)
    ahead.launch_all(architecture)


def launch_candidate(config: GemmConfig) -> None:
    """The forward product with one configuration, as `benchmarks.tune` launches it."""
    hidden, weight = torch.zeros(256, 1024, dtype=torch.bfloat16), torch.zeros(512, 1024, dtype=torch.bfloat16)
    z_y = torch.zeros(256)
    e = torch.zeros(256, 512, dtype=torch.bfloat16)
    block_stats = BlockStats.empty(-(-512 // config.BLOCK_N), 256, torch.device("cpu"))
    anchors = Anchors(z_y, z_y.clone(), z_y + 48.0)
    anchored_gemm(hidden, weight, e, anchors, block_stats, None, None, config, 1)
    # the rows to compute again come as a list: another variant
    every, count = torch.arange(2, dtype=torch.int32), torch.full((), 2, dtype=torch.int32)
    anchored_gemm(hidden, weight, e, anchors, block_stats, every, count, config, 1)
    # and so is the launch before the rows are counted: no list, but their number on the device
    anchored_gemm(hidden, weight, e, anchors, block_stats, None, count, config, 1)


def main() -> None:
    """Compiles, and prints one JSON object with the counts."""
    capability = int(sys.argv[1])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stub_libcuda(Path(folder))
        triton.runtime.driver.set_active(PretendedDriver(capability))
        with Counter() as counter:
            launch_everything(capability)
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    for suffix in ("source", "ttir", "ttgir", "llir"):  # what a device does not need of them
        for path in cache.rglob(f"*.{suffix}"):
            path.unlink()
    for line in counter.failed:
        print(line, file=sys.stderr)
    print(json.dumps({"kernels": len(counter.kernels), "launchers": counter.launchers, "failed": len(counter.failed)}))


if __name__ == "__main__":
    main()
