"""``make sanitize``: the native tests under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitizers/run.py [tests or arguments of pytest ...]

Builds csrc's CPU operators with both into a folder of their own (``build/sanitized``, never over the installed ones),
and runs the tests that reach them with every report fatal. What the processor cannot run is not checked: without
AVX-512 or AMX those paths are compiled and left alone, and the run says so. Leaks are not looked for, since Python
keeps what it has to the end.

First two faults that were planted (`planted.cpp`) must be reported in the same way, or the rest would prove nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"
REPORT = 99
# nvcc and processes with a compiler of their own do not run under a preloaded sanitizer, and reach none of csrc/cpu
TESTS = ["tests/ops", "tests/memory", "tests/losses/test_native_cpu.py", "tests/losses/test_torch_backend.py"]
TESTS += ["tests/losses/test_contract.py", "tests/losses/test_peer_cases.py", "tests/losses/test_wrong_arguments.py"]
TESTS += ["tests/losses/test_fuzz_arguments.py"]
LEFT_OUT = ["tests/ops/test_cuda_compile.py", "tests/ops/test_cuda_emulated.py"]


def build(folder: Path) -> Path:
    """Compile csrc's CPU operators with the sanitizers and return the folder to import them from."""
    environment = {**os.environ, "NTPSEG_SKIP_CUDA": "1", "NTPSEG_SANITIZE": "address,undefined"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib")]
    subprocess.run([*command, "--build-temp", str(folder / "temp")], cwd=ROOT, env=environment, check=True)
    return folder / "lib"


def plant(folder: Path) -> list[tuple[str, list[str], str]]:
    """Compile the planted faults.

    Returns:
        For each its name, a command that runs into it, and what the report must say.
    """
    library = folder / "planted.so"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = Path(__file__).with_name("planted.cpp")
    subprocess.run(["g++", *flags, "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(library)], check=True)
    call = f"import ctypes; c = ctypes.c_int64; print(ctypes.CDLL({str(library)!r})."
    commands = [
        ("no fault", "planted_write(c(3)))", ""),
        ("a write past an array", "planted_write(c(4)))", "heap-buffer-overflow"),
        ("an integer overflow", "planted_overflow(2**31 - 1, 1))", "signed integer overflow"),
    ]
    return [(name, [sys.executable, "-c", call + code], report) for name, code, report in commands]


def environment(library: Path) -> dict[str, str]:
    """What a process needs that runs on the sanitized operators in a folder."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last one, or exceptions are not caught
    paths = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
    missing = [name for name, path in zip(names, paths) if not Path(path).is_absolute()]
    if missing:
        sys.exit(f"gcc must come with its sanitizers' libraries, got none of {', '.join(missing)}: install libasan")
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(paths),
        "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:exitcode={REPORT}",
        "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:exitcode={REPORT}",
        "NTPSEG_SANITIZED_BUILD": str(library),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }


def instruction_sets() -> str:
    """Which of the paths in csrc/cpu this processor runs, and which it does not."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    paths = {"AVX2": "avx2", "AVX-512": "avx512vl", "AMX": "amx_bf16"}
    here = [name for name, flag in paths.items() if flag in flags]
    gone = [name for name in paths if name not in here]
    return f"checked here: baseline, {', '.join(here)}" + (
        f"; NOT run by this processor: {', '.join(gone)}" if gone else ""
    )


def main() -> int:
    """Build and run."""
    print(f"sanitizers: address, undefined; {instruction_sets()}", flush=True)
    for name, command, report in plant(BUILD):
        found = subprocess.run(command, env=environment(BUILD), capture_output=True, text=True)
        if found.returncode != (REPORT if report else 0) or report not in found.stderr:
            sys.exit(
                f"sanitizers must see the planted faults, got {found.returncode} for {name}: {found.stderr[-2000:]}"
            )
    library = build(BUILD)
    tests = sys.argv[1:] or [*TESTS, *(f"--ignore={name}" for name in LEFT_OUT)]
    # a report goes to file descriptor 2 and ends the process: captured, it would be lost
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "sanitized_extension",
        "-n",
        "0",
        "--timeout=0",
        "--capture=sys",
        *tests,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(library))
    print("sanitizers: no report" if done.returncode == 0 else f"sanitizers: FAILED with exit code {done.returncode}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
