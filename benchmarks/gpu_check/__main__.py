"""Runs the steps of a stage on a CUDA device: ``python -m benchmarks.gpu_check --stage 1 --out DIR [--kit DIR]``.

Nothing is fetched. Results and logs go into one archive, ``DIR/stage-1.tar.gz``, which is written anew after each step,
so that what was measured survives whatever happens to the rest; ``DIR/stage-1.txt`` is the table of what passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.runner import archive, run_step, time_limit
from benchmarks.gpu_check.stages import SECONDS, STAGES, stage_steps
from benchmarks.gpu_check.triton_cache import relocate
from benchmarks.gpu_check.wheels import unpack
from benchmarks.harness.environment import ROOT, describe
from ntpseg.utils.files import write_json, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where every step passed, 1 where one did not or there is no CUDA device, 2 for bad usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder of the archive")
    parser.add_argument("--kit", type=Path, default=ROOT / "build" / "gpu-kit", help="what `make gpu-kit` built")
    parser.add_argument("--wheels", type=Path, help="folder of the peers' wheel files, where the kit has none")
    parser.add_argument("--seconds", type=float, help="all steps together; the stage's own by default")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these steps of the stage")
    parser.add_argument("--anywhere", action="store_true", help="rehearse: go on where there is no CUDA device")
    args = parser.parse_args(arguments)
    if args.wheels is not None and not args.wheels.is_dir():
        print(f"gpu-check: wheels must be a folder of wheel files, got {args.wheels}", file=sys.stderr)
        return 2
    if not (torch.cuda.is_available() or args.anywhere):
        built = torch.version.cuda
        why = "this PyTorch was built without CUDA" if built is None else "PyTorch finds no CUDA device"
        print(f"gpu-check: {why} (torch {torch.__version__}); nothing was checked", file=sys.stderr)
        return 1
    steps = stage_steps(args.stage, native=install_native(args.kit, ROOT / "ntpseg"))
    if args.steps is not None:
        unknown = set(args.steps) - {step.name for step in steps}
        if unknown:
            names = ", ".join(step.name for step in steps)
            print(f"gpu-check: steps must be among {names}, got {', '.join(sorted(unknown))}", file=sys.stderr)
            return 2
        steps = [step for step in steps if step.name in args.steps]
    return _run(steps, args)


def _run(steps: Sequence[Any], args: argparse.Namespace) -> int:
    started = time.monotonic()
    budget = args.seconds or SECONDS[args.stage]
    work = ROOT / "build" / "gpu-check" / f"stage-{args.stage}"
    shutil.rmtree(work, ignore_errors=True)  # results of an earlier run must not pass for this one's
    (work / "results").mkdir(parents=True)
    args.out.mkdir(parents=True, exist_ok=True)
    relocate(args.kit / "triton-cache")
    environment = step_environment(args.kit, args.wheels, work)
    outcomes: list[dict[str, Any]] = []
    for index, step in enumerate(steps):
        limit = time_limit([each.seconds for each in steps[index:]], budget - (time.monotonic() - started))
        outcomes.append(run_step(step.name, step.command, limit, environment, work / "logs"))
        seconds = round(time.monotonic() - started, 1)
        about = describe(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else {}
        write_json(work / "results" / "gpu-check.json", {"gpu_check": outcomes, "seconds": seconds, **about})
        write_text(args.out / f"stage-{args.stage}.txt", table(outcomes, seconds))
        archive(work, args.out / f"stage-{args.stage}.tar.gz")
    print("\n" + table(outcomes, time.monotonic() - started), flush=True)
    return 0 if all(outcome["result"] == "passed" for outcome in outcomes) else 1


def table(outcomes: Sequence[dict[str, Any]], seconds: float) -> str:
    """Steps, seconds and results, and the last lines of each that did not pass."""
    lines = [f"{each['step']:<16} {each['seconds']:6.1f} s  {each['result']}" for each in outcomes]
    lines.append(f"{seconds:.0f} s in all")
    for each in outcomes:
        if each["result"] != "passed":
            lines += ["", f"-- {each['step']}", *each["tail"]]
    return "\n".join(lines) + "\n"


def step_environment(kit: Path, wheels: Path | None, work: Path) -> dict[str, str]:
    """The environment variables of every step: paths of what the kit brought, and where results go."""
    paths = [str(ROOT)]
    if (kit / "site-packages").is_dir():
        paths.append(str(kit / "site-packages"))
    if wheels is not None:
        paths += unpack(wheels, work / "peers")
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "NTPSEG_CHECK_RESULTS": str(work / "results"),
    }
    if (kit / "triton-cache").is_dir():
        environment.setdefault("TRITON_CACHE_DIR", str((kit / "triton-cache").resolve()))
    if (kit / "kit.json").is_file():
        environment.setdefault("NTPSEG_COMMIT", json.loads((kit / "kit.json").read_text())["commit"])
    if torch.cuda.is_available():  # one architecture: building for all of them would take minutes
        major, minor = torch.cuda.get_device_capability()
        environment.setdefault("NTPSEG_CUDA_ARCHS", f"{major}{minor}")
    return environment


def install_native(kit: Path, package: Path) -> bool:
    """Puts the kit's native operators into `package`; whether it then has CUDA ones that this Python would load."""
    for library in sorted((kit / "ntpseg").glob("_C*.so")):
        # whatever lies there: git ignores it, so that it may be of an earlier commit
        partial = package / f"{library.name}.part"
        shutil.copy2(library, partial)
        os.replace(partial, package / library.name)  # a process that has the old one loaded keeps it
    return any((package / f"_C_cuda{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


if __name__ == "__main__":
    sys.exit(main())
