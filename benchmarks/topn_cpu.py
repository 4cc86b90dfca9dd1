"""Times `ntpseg.ops.topn_errors` on the CPU against the same thing composed of PyTorch operators.

    python benchmarks/topn_cpu.py --threads 1 2 --output benchmarks/results/topn_cpu.json

Both sides get the same tensors in the same process and alternate call by call, so that other load on the machine falls
on both alike. Medians are compared, and the shortest times beside them: with as many threads as cores, other load stops
most calls for a scheduler's turn in the middle, and the medians then say more about that than about either side
(OMP_WAIT_POLICY=passive helps). The composition is what one would write by hand: mask, topk, pad; it breaks ties as it
likes and takes an error of deviation -inf for padding, so it does a little less than the operator.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntpseg.ops import extension_status, topn_errors

HEADLINE = (64, 1568, 64)
ROWS, LENGTHS, SLOTS, DENSITIES = (1, 8, 64), (16, 256, 1568, 4096, 16384), (1, 16, 64, 256), (0.02, 0.13, 1.0)


def composition(deviation: Tensor, is_error: Tensor, n: int) -> tuple[Tensor, Tensor]:
    kept = min(n, deviation.shape[1])
    value, index = torch.where(is_error, deviation, -torch.inf).topk(kept, dim=1)
    index = torch.where(value == -torch.inf, -1, index).int()
    pad = (0, n - kept)
    return torch.nn.functional.pad(value, pad, value=-torch.inf), torch.nn.functional.pad(index, pad, value=-1)


def interleaved(first: Callable[[], Any], second: Callable[[], Any], seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each call of two functions that take turns, at least 11 turns."""
    for _ in range(3):
        first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[0]) < 11:
        for call, spent in zip((first, second), times):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return times


def measure(rows: int, length: int, n: int, density: float, seconds: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    deviation = torch.rand(rows, length, generator=generator) * 10
    is_error = torch.rand(rows, length, generator=generator) < density
    expected, found = composition(deviation, is_error, n), topn_errors(deviation, is_error, n)
    if not torch.equal(expected[0], found[0]):
        raise AssertionError(f"the two disagree at {rows} x {length}, n = {n}")
    ours, theirs = interleaved(
        lambda: topn_errors(deviation, is_error, n), lambda: composition(deviation, is_error, n), seconds
    )
    result: dict[str, Any] = {"rows": rows, "length": length, "n": n, "density": density, "turns": len(ours)}
    for name, statistic in (("median", statistics.median), ("shortest", min)):
        result[name] = {
            "ours_us": round(statistic(ours) * 1e6, 2),
            "composition_us": round(statistic(theirs) * 1e6, 2),
            "speedup": round(statistic(theirs) / statistic(ours), 2),
        }
    return result


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":")
    return {
        "commit": commit.stdout.strip(),
        "device": model.split(":")[1].strip() or platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": extension_status(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "isa": os.environ.get("NTPSEG_CPU_ISA", "best"),
    }


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def describe(result: dict[str, Any]) -> str:
    median, shortest = result["median"], result["shortest"]
    return (
        f"{result['threads']} thread(s) {result['rows']:>3} x {result['length']:<5} n {result['n']:<3} "
        f"{result['density']:>4.0%} errors: median {median['ours_us']:.1f} us against "
        f"{median['composition_us']:.1f} us, {median['speedup']:.2f} x; shortest {shortest['speedup']:.2f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.15, help="time per shape")
    parser.add_argument("--headline", action="store_true", help="only 64 x 1568, n = 64")
    parser.add_argument("--quick", action="store_true", help="one small shape, at least 11 turns")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    grid = [HEADLINE] if arguments.headline else [*itertools.product(ROWS, LENGTHS, SLOTS)]
    if arguments.quick:
        grid, arguments.seconds = [(4, 100, 8)], 0.0
    report = {"benchmark": "topn_cpu", "environment": environment(), "results": []}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for (rows, length, n), density in itertools.product(grid, DENSITIES):
            result = {"threads": threads, **measure(rows, length, n, density, arguments.seconds)}
            report["results"].append(result)
            print(describe(result), flush=True)
    for name in ("median", "shortest"):
        print("least by", name, describe(min(report["results"], key=lambda result: result[name]["speedup"])))
    if arguments.output:
        write(arguments.output, report)


if __name__ == "__main__":
    main()
