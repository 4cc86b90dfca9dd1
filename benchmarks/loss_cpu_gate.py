"""The loss on the CPU against three plain matrix products, and against PyTorch's own linear cross-entropy.

    python benchmarks/loss_cpu_gate.py [--dtype float32 bfloat16] [--threads 2] [--repeats 5] [--clock wall|cpu]
        [--against products pytorch products_float32] [--output FILE] [--append]

All contestants run in one process, interleaved, so that another job on the machine slows all of them; a ratio is the
median over rounds of the ratio within a round. "Products" are ``H W^T``, ``G W`` and ``G^T H`` with whole ``[R, V]``
operands in the same dtype, their outputs allocated beforehand. "PyTorch" is ``F.linear_cross_entropy(...,
options=LinearCrossEntropyOptions())``, forward and backward, which computes the cross-entropy alone. "Products in
float32" are the products again on the operands' values in float32: the yardstick for bfloat16 on a processor without
bfloat16 units, where PyTorch's own bfloat16 products are so slow that beating them says nothing, and take minutes at
the full shape (leave them out with ``--against``, or measure them with few ``--rows``). Ours computes CE, TCL and HET
with per-token outputs. Memory is the growth of the peak resident set over a forward and backward
pass, less the gradients that it leaves. ``--clock cpu`` counts the process's own seconds of processor time, which other
jobs on the machine disturb less; with one thread the two are the same on an idle machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from ntpseg import HardTokens, ntp_loss
from ntpseg.losses import products
from ntpseg.ops import loss_cpu

OTHERS = ("products", "pytorch", "products_float32")
GATES = {"products": {"float32": 1.10, "bfloat16": 1.30}, "pytorch": 0.75, "extra_mb": 200}


def contestants(rows: int, width: int, classes: int, negatives: int, dtype: torch.dtype) -> dict[str, Callable]:
    """The things to time, on the same operands."""
    batch = 8
    time_steps = rows // batch + 1
    hidden = torch.randn(batch, time_steps, 1, width).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (batch, time_steps))
    position = torch.randint(1, time_steps, (batch, 16))
    het = HardTokens(position, torch.randint(0, classes, position.shape))
    flat, target = hidden.detach()[:, :-1, 0].reshape(-1, width), labels[:, 1:].reshape(-1)
    matrix = weight.detach()

    def ours() -> None:
        hidden.grad = weight.grad = None
        ntp_loss(hidden, weight, labels, negatives=negatives, het=het, backend="torch").loss.backward()

    def products_in(dtype: torch.dtype) -> Callable[[], None]:
        left, right = flat.to(dtype), matrix.to(dtype)
        scores = torch.empty(len(left), classes, dtype=dtype)
        d_left, d_right = torch.empty_like(left), torch.empty_like(right)

        def three() -> None:
            torch.mm(left, right.t(), out=scores)
            torch.mm(scores, right, out=d_left)
            torch.mm(scores.t(), left, out=d_right)

        return three

    leaf, head = flat.clone().requires_grad_(), matrix.clone().requires_grad_()

    def pytorch() -> None:
        leaf.grad = head.grad = None
        F.linear_cross_entropy(leaf, head, target, options=torch.nn.LinearCrossEntropyOptions()).backward()

    found = {"ours": ours, "products": products_in(dtype), "pytorch": pytorch}
    return found if dtype == torch.float32 else found | {"products_float32": products_in(torch.float32)}


def measure(functions: dict[str, Callable], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every round, each round running all in turn."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def extra_megabytes(rows: int, width: int, classes: int, negatives: int, dtype: torch.dtype) -> float:
    """Peak resident set of one forward and backward pass beyond what was there before and the gradients."""
    ours = contestants(rows, width, classes, negatives, dtype)["ours"]
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    ours()
    peak = _status("VmHWM")
    gradients = (rows * width + classes * width) * dtype.itemsize / 1e6
    return peak - before - gradients


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def commit() -> str:
    """The commit that was measured, marked where the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    revision = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return revision + ("+changes" if changed else "")


def cpu_name() -> str:
    """The processor's name, with the instruction sets that matter here."""
    text = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
    return name + "".join(f", {flag}" for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=6272)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=32768)
    parser.add_argument("--negatives", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--against", nargs="+", choices=OTHERS, default=OTHERS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loss_cpu_gate.json")
    parser.add_argument("--append", action="store_true", help="make the output a list, of what it holds and this run")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    clock = time.perf_counter if settings.clock == "wall" else time.process_time
    shape = (settings.rows, settings.width, settings.classes, settings.negatives)
    results = {}
    for name in settings.dtype:
        dtype = getattr(torch, name)
        extra = extra_megabytes(*shape, dtype)  # before the large operands of the others are there
        everyone = contestants(*shape, dtype)
        chosen = {key: everyone[key] for key in ("ours", *settings.against) if key in everyone}
        seconds = measure(chosen, settings.repeats, clock)
        ratios = {
            other: [a / b for a, b in zip(seconds["ours"], seconds[other], strict=True)]
            for other in seconds
            if other != "ours"
        }
        results[name] = {
            "median_seconds": {key: statistics.median(values) for key, values in seconds.items()},
            "ratio": {key: statistics.median(values) for key, values in ratios.items()},
            "ratio_range": {key: [min(values), max(values)] for key, values in ratios.items()},
            "extra_mb": extra,
        }
        limits = {"products": GATES["products"][name], "pytorch": GATES["pytorch"]}
        met = {other: results[name]["ratio"][other] <= limit for other, limit in limits.items() if other in ratios}
        met["extra_mb"] = extra <= GATES["extra_mb"]
        results[name]["met"] = met
        print(name, json.dumps(results[name], indent=1))
    report = {
        "benchmark": "loss_cpu_gate",
        "shape": dict(zip(("R", "D", "V", "m"), shape, strict=True)),
        "gates": GATES,
        "results": results,
        "commit": commit(),
        "device": cpu_name(),
        "threads": settings.threads,
        "clock": settings.clock,
        "native_level": loss_cpu.level(),
        "bfloat16_units": products.has_bfloat16_units(),
        "load_average": os.getloadavg(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    if settings.append:
        held = json.loads(settings.output.read_text()) if settings.output.exists() else []
        report = [*held, report] if isinstance(held, list) else [held, report]
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    partial = settings.output.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(settings.output)


if __name__ == "__main__":
    main()
