"""Builds ntpseg's native operators; the metadata is in pyproject.toml.

``ntpseg._C`` holds the CPU operators and is built wherever PyTorch and a C++ compiler are; ``ntpseg._C_cuda`` adds the
CUDA ones. By default it is built where PyTorch was built for CUDA and an nvcc of the same major version is found.

    NTPSEG_SKIP_CUDA=1      never build the CUDA operators
    NTPSEG_FORCE_CUDA=1     build them whatever PyTorch is (a login node, a cross build), and fail if that fails
    NTPSEG_CUDA_ARCHS       what nvcc builds for; "80 90a 100" by default, with PTX for the last
    CUDA_HOME, CUDA_PATH    where to look for nvcc before the PATH
    NTPSEG_SANITIZE         sanitizers for the CPU operators, such as "address,undefined"; `make sanitize` sets it

Both use PyTorch's stable ABI and Python's limited API, so one build serves every supported version of either. Without
PyTorch or a compiler the package is installed without them and runs on plain PyTorch (`ntpseg env` says so).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

from setuptools import setup

ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11
CPU_SOURCES = [
    "csrc/cpu/binding.cpp",
    "csrc/cpu/loss_amx.cpp",
    "csrc/cpu/loss_binding.cpp",
    "csrc/cpu/loss_rows.cpp",
    "csrc/cpu/loss_rows_avx2.cpp",
    "csrc/cpu/loss_rows_avx512.cpp",
    "csrc/cpu/merge.cpp",
    "csrc/cpu/rank_avx2.cpp",
    "csrc/cpu/rank_avx512.cpp",
    "csrc/cpu/rank_baseline.cpp",
]
DEFAULT_ARCHS = "80 90a 100"
CUDA_BINDING, CUDA_KERNELS = "csrc/cuda/binding.cpp", "csrc/cuda/topn.cu"


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def wants_cuda(torch_cuda: str | None) -> bool:
    """Decide whether the CUDA operators are built, and say why not."""
    if os.environ.get("NTPSEG_SKIP_CUDA") == "1":
        return False
    nvcc = find_nvcc()
    if os.environ.get("NTPSEG_FORCE_CUDA") == "1":
        if nvcc is None:
            raise RuntimeError("nvcc must be in CUDA_HOME or on the PATH with NTPSEG_FORCE_CUDA=1, got neither")
        return True
    if torch_cuda is None or nvcc is None:
        return False
    release = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if release is None or release[1] != torch_cuda.split(".")[0]:
        warnings.warn(f"{nvcc} is not of CUDA {torch_cuda}, as PyTorch is: CUDA operators are left out", stacklevel=2)
        return False
    return True


def cuda_libraries(nvcc: str) -> list[str]:
    """Ask nvcc where its toolkit's libraries are; it may be a wrapper that lies elsewhere."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True)
    return re.findall(r'"-L([^"]+)"', dry.stderr)


def gencodes(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1].rstrip("abcdef")
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def sanitizer_flags() -> list[str]:
    """Compile and link with what NTPSEG_SANITIZE names, every finding fatal; nothing where it is not set."""
    names = os.environ.get("NTPSEG_SANITIZE")
    # -O1 keeps the frames that a report shows, and the vector intrinsics are as quick as it needs
    return ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={names}", "-fno-sanitize-recover=all"] if names else []


def native() -> dict[str, object]:
    """Return what setup() needs to build the operators; nothing where PyTorch is missing."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        warnings.warn("PyTorch is not importable here: ntpseg is installed without native operators", stacklevel=2)
        return {}

    class Build(BuildExtension):
        """Compiles the CUDA kernels with nvcc alone and lets the package do without operators that do not build."""

        def build_extensions(self) -> None:
            wanted, built = list(self.extensions), []
            for extension in wanted:
                self.extensions = [extension]
                try:
                    if extension.name == "ntpseg._C_cuda":
                        extension.extra_objects = [self.compile_kernels()]
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:
                    if os.environ.get("NTPSEG_FORCE_CUDA") == "1":
                        raise
                    warnings.warn(f"{extension.name} did not build, ntpseg goes without it: {error}", stacklevel=2)
            self.extensions = built

        def compile_kernels(self) -> str:
            folder = Path(self.build_temp).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            output = folder / "topn_kernels.o"
            archs = os.environ.get("NTPSEG_CUDA_ARCHS", DEFAULT_ARCHS).split()
            flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "--threads", "0", *gencodes(archs)]
            self.spawn([str(find_nvcc()), *flags, "-c", CUDA_KERNELS, "-o", str(output)])
            return str(output)

    sanitizers = sanitizer_flags()
    flags = {"cxx": [*(sanitizers or ["-O3", "-g0"]), "-std=c++20", *ABI_FLAGS]}
    extensions = [
        CppExtension(
            "ntpseg._C", CPU_SOURCES, py_limited_api=True, extra_compile_args=flags, extra_link_args=sanitizers
        )
    ]
    if wants_cuda(torch.version.cuda):
        extensions.append(
            CppExtension(
                "ntpseg._C_cuda",
                [CUDA_BINDING],
                py_limited_api=True,
                extra_compile_args={"cxx": [*flags["cxx"], "-DUSE_CUDA"]},
                library_dirs=cuda_libraries(str(find_nvcc())),
                # The static runtime works beside whichever PyTorch brings: both use the device's primary context.
                # libtorch names torch_cuda, but a linker that keeps only what is used drops libtorch.
                libraries=[*(["torch_cuda"] if torch.version.cuda else []), "cudart_static", "dl", "rt", "pthread"],
            )
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**native())
