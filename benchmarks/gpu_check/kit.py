"""Builds what can travel to a machine with a GPU but no network: ``python -m benchmarks.gpu_check.kit --out DIR``.

Run it by the Python and with the packages (PyTorch for CUDA, Triton) of that machine; no GPU is needed. DIR gets

    ntpseg/         the native operators, for one architecture, with PTX
    triton-cache/   every kernel variant that the checks are known to need, and the launchers of Triton
    site-packages/  the peers, from a folder of wheels
    kit.json        commit and versions

Kernels are compiled through Triton's own just-in-time path under a driver that only pretends to be there: the keys in
the cache are then those that a device of this architecture will ask for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.wheels import unpack
from benchmarks.harness.environment import ROOT, commit
from ntpseg.utils.files import write_json


def build_native(out: Path, architecture: str) -> None:
    """Builds ``_C`` and ``_C_cuda`` into ``out/ntpseg``.

    Args:
        out: folder of the kit.
        architecture: for nvcc, for example "90a".
    """
    environment = {**os.environ, "NTPSEG_FORCE_CUDA": "1", "NTPSEG_CUDA_ARCHS": architecture}
    # ninja lies beside the Python that runs this, which need not be an activated environment
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    temporary = out / "build"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(out), "--build-temp", str(temporary)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    shutil.rmtree(temporary, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"gpu-kit: building the native operators failed:\n{done.stderr[-2000:]}")


def warm_triton(out: Path, capability: int) -> dict[str, int]:
    """Fills ``out/triton-cache``; how many kernels and launchers it holds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str((out / "triton-cache").resolve()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu_check.warm", str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("gpu-kit: warming Triton's cache failed")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the kit and prints what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-kit")
    parser.add_argument("--capability", type=int, default=90, help="of the device: 80, 90 or 100")
    parser.add_argument("--wheels", type=Path, help="folder of the peers' wheel files")
    args = parser.parse_args(arguments)
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"wheels must be a folder of wheel files, got {args.wheels}")
    import torch
    import triton

    args.out.mkdir(parents=True, exist_ok=True)
    build_native(args.out, f"{args.capability}a" if args.capability >= 90 else str(args.capability))
    shutil.rmtree(args.out / "triton-cache", ignore_errors=True)  # what an older source left would travel for nothing
    counts = warm_triton(args.out, args.capability)
    shutil.rmtree(args.out / "site-packages", ignore_errors=True)
    if args.wheels is not None:
        unpack(args.wheels, args.out)
    content = {"commit": commit(), "torch": torch.__version__, "triton": triton.__version__, **counts}
    content |= {"python": sys.version.split()[0], "capability": args.capability}
    write_json(args.out / "kit.json", content)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB; {json.dumps(content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
