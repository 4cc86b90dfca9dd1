"""What ``make gpu-check`` runs: environment, native build, GPU tests, quick suite, profile, report; under ten minutes.

    python -m benchmarks.gpu_check [--wheels DIR]

Nothing is fetched. The peers' wheels (Liger, cut-cross-entropy, QuACK with what it needs) come from DIR and are
unpacked beside the environment, not into it, so that its own PyTorch, and what that needs, stay; a peer that is not
there is reported as unavailable. The steps share the time by their limits: a slow one takes nothing from those after
it, a fast one leaves them more. Output is printed and kept in build/gpu-check/; results are written case by case.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import ROOT, describe
from benchmarks.harness.rows import RESULTS
from ntpseg.utils.files import write_json

BUDGET = 590.0  # seconds, all steps together
REPORT = 30.0  # seconds of it that are kept for the report: what has been measured by then gets written
_KEEP_OUT = {"torch", "triton", "pytorch-triton", "numpy"}  # a wheel of these would replace the machine's own
_UNPACK = 60.0
_ADDED = """
import json, site, sys
before = set(sys.path)
site.addsitedir(sys.argv[1])
print(json.dumps([path for path in sys.path if path not in before]))
"""
_ENVIRONMENT = "import json; from ntpseg.environment import describe; print(json.dumps(describe(), indent=1))"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where every step passed, 1 where one did not or there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of the peers' wheels")
    args = parser.parse_args(arguments)
    if args.wheels is not None and not args.wheels.is_dir():
        print(f"gpu-check: wheels must be a folder of wheel files, got {args.wheels}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this PyTorch was built without CUDA" if built is None else "PyTorch finds no CUDA device"
        print(f"gpu-check: {why} (torch {torch.__version__}); nothing was checked", file=sys.stderr)
        return 1
    logs = ROOT / "build" / "gpu-check"
    logs.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    environment = _environment(args.wheels, logs / "peers")
    results: list[dict[str, Any]] = []
    pending = steps(environment)
    for index, (name, _, command) in enumerate(pending):
        limit = time_limit(pending[index:], BUDGET - (time.monotonic() - started))
        results.append(run_step(name, command, limit, environment, logs))
        _write(results, started)
    print()
    for result in results:
        print(f"{result['step']:<12} {result['seconds']:6.1f} s  {result['result']}")
    print(f"{time.monotonic() - started:.0f} s in all")
    return 0 if all(result["result"] == "passed" for result in results) else 1


def steps(environment: dict[str, str]) -> list[tuple[str, float, list[str]]]:
    """Name, limit in seconds and command of each."""
    python = sys.executable
    tests = [python, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    bench = [python, "-m", "benchmarks"]
    build = [("build", 150.0, [python, "setup.py", "-q", "build_ext", "--inplace"])]
    limits = {"loss": 225.0, "train": 45.0, "attention": 40.0, "topn": 20.0, "decode": 35.0}
    return [
        ("environment", 25.0, [python, "-c", _ENVIRONMENT]),
        *([] if list((ROOT / "ntpseg").glob("_C_cuda*.so")) else build),
        ("tests", 70.0, [*tests, "-m", "not slow"]),
        *((name, limit, [*bench, name, "--quick", "--device", "cuda"]) for name, limit in limits.items()),
        ("profile", 55.0, [python, "-m", "benchmarks.profile_loss", "--quick"]),
        ("sanitizer", 30.0, [*tests, "-m", "slow"]),  # last, so that it gets whatever time is left
        ("report", REPORT, [*bench, "report"]),
    ]


def time_limit(pending: Sequence[tuple[str, float, list[str]]], left: float) -> float:
    """Seconds for the first of some steps: its share, by the limits, of what is left; the report's are kept for it."""
    if len(pending) == 1:
        return left
    return pending[0][1] / sum(limit for _, limit, _ in pending[:-1]) * (left - REPORT)


def run_step(
    name: str, command: Sequence[str], limit: float, environment: dict[str, str], logs: Path
) -> dict[str, Any]:
    """Runs one, shows and keeps its output; "passed", "failed (code)" or "out of time"."""
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    if limit < 5:
        return {"step": name, "seconds": 0.0, "result": "out of time"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process,
        subprocess.Popen(["tee", str(logs / f"{name}.log")], stdin=process.stdout) as tee,
    ):
        try:
            code = process.wait(timeout=limit)
            result = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the group: a benchmark may have children of its own
            process.wait()
            result = "out of time"
        with contextlib.suppress(subprocess.TimeoutExpired):
            tee.wait(timeout=10)
        tee.kill()  # whoever left the group still holds the pipe
    return {"step": name, "seconds": time.monotonic() - start, "result": result}


def _environment(wheels: Path | None, folder: Path) -> dict[str, str]:
    paths = [str(ROOT)]
    if wheels is not None:
        paths += unpack(wheels, folder)
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        # one architecture: building for all of them would take minutes of the ten
        "NTPSEG_CUDA_ARCHS": os.environ.get("NTPSEG_CUDA_ARCHS", f"{major}{minor}"),
    }


def unpack(wheels: Path, folder: Path) -> list[str]:
    """Puts the peers' wheels into a folder and returns what must be on the path for them.

    A wheel that is not for this machine is named and left out. Wheels may carry .pth files, which Python reads in site
    folders only, and which may be code (nvidia-cutlass-dsl's is): what they add is returned too.
    """
    folder = folder / "site-packages"  # QuACK takes no folder of another name for a place of installed code
    kept = _kept()
    chosen = sorted(str(path) for path in wheels.glob("*.whl") if _plain(path.name.split("-")[0]) not in kept)
    if not chosen:
        print(f"gpu-check: no wheels of peers in {wheels}", file=sys.stderr)
        return []
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    command += ["--target", str(folder)]
    try:
        if subprocess.run([*command, *chosen], timeout=_UNPACK).returncode:
            for wheel in chosen:  # one that does not fit stops them all
                if subprocess.run([*command, wheel], timeout=_UNPACK).returncode:
                    print(f"gpu-check: left out {wheel}", file=sys.stderr)
    except subprocess.TimeoutExpired:
        print(f"gpu-check: unpacking {wheels} takes longer than {_UNPACK:.0f} s", file=sys.stderr)
    if not folder.is_dir():
        return []
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    added = subprocess.run([sys.executable, "-c", _ADDED, str(folder)], env=environment, capture_output=True, text=True)
    return [str(folder), *(json.loads(added.stdout) if added.returncode == 0 else [])]


def _kept() -> set[str]:
    """What stays the environment's own: PyTorch, and what of its requirements is installed."""
    names = set(_KEEP_OUT)
    for requirement in importlib.metadata.requires("torch") or ():
        name = re.split(r"[^\w.-]", requirement)[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            names.add(_plain(name))
    return names


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _write(results: list[dict[str, Any]], started: float) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    content = {"gpu_check": results, "seconds": round(time.monotonic() - started, 1), **describe(device)}
    write_json(RESULTS / "gpu-check.json", content)


if __name__ == "__main__":
    sys.exit(main())
