"""What the suite runs and how: its options, the cases that they choose, one benchmark run, its rows written."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.harness import Case, DeviceLost, Grid, Settings, run_case
from benchmarks.harness.ceilings import copy_bytes, matmul_flops
from benchmarks.harness.environment import describe, slug
from benchmarks.harness.rows import Row, read_file, rounded, write
from benchmarks.harness.timing import Budget
from benchmarks.registry import BENCHMARKS
from benchmarks.report.tables import ceiling_fraction

GATED = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.gated)
_BUDGETS: dict[tuple[str, Grid], Budget] = {
    ("cpu", "quick"): Budget(seconds=0.2, min_rounds=3, max_rounds=5, warmup=1),
    ("cpu", "full"): Budget(seconds=10.0, min_rounds=5, max_rounds=200, warmup=1),
    ("cpu", "gate"): Budget(seconds=1.0, min_rounds=5, max_rounds=5000, warmup=1),
    ("cuda", "quick"): Budget(seconds=2.0, min_rounds=7, max_rounds=200, warmup=1),
    ("cuda", "full"): Budget(seconds=4.0, min_rounds=15, max_rounds=500, warmup=3),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is run and how; both sides of a comparison of revisions take them."""
    parser.add_argument("--quick", action="store_true", help="a small grid and few rounds")
    parser.add_argument("--gate", action="store_true", help="the CPU cases that loss and topn promise limits for")
    parser.add_argument("--device", help="cpu or cuda; a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's own choice by default")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's processor time")
    parser.add_argument("--seconds", type=float, help="time budget of the rounds of one case")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these providers and the reference")
    parser.add_argument("--where", nargs="+", default=[], metavar="KEY=VALUE", help="only cases with these parameters")
    parser.add_argument("--run", type=Path, metavar="DIR", help="loss: on the hidden states of this trained run")


def grid_of(args: argparse.Namespace) -> Grid:
    """Which grid the options choose."""
    return "gate" if args.gate else "quick" if args.quick else "full"


def benchmark_names(args: argparse.Namespace) -> tuple[str, ...]:
    """The benchmarks that "all" or one name stands for.

    Raises:
        ValueError: the options want what the benchmark does not have.
    """
    if args.run is not None and args.what != "loss":
        raise ValueError(f"benchmark must be loss with --run, got {args.what}")
    if args.gate and args.what not in (*GATED, "all"):
        raise ValueError(f"benchmark must be one of {', '.join(GATED)} with --gate, got {args.what}")
    return (args.what,) if args.what != "all" else GATED if args.gate else tuple(BENCHMARKS)


def run_settings(args: argparse.Namespace, without: Sequence[str] = ()) -> Settings:
    """Device, budget and providers.

    Args:
        args: the command line.
        without: names of providers that lost the device in an earlier process.

    Raises:
        ValueError: the device is not there, or does not go with the other options.
    """
    device = parse_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu where PyTorch finds no CUDA device, got {args.device!r}")
    if device.type == "cuda" and (args.gate or args.clock == "cpu"):
        raise ValueError(f"device must be cpu with --gate or --clock cpu, got {str(device)!r}")
    budget = _BUDGETS[device.type, grid_of(args)]
    if args.seconds is not None:
        if not 0 <= args.seconds < float("inf"):
            raise ValueError(f"--seconds must be >= 0, got {args.seconds}")
        budget = Budget(args.seconds, budget.min_rounds, budget.max_rounds, budget.warmup)
    only = frozenset(args.only) if args.only else None
    return Settings(device, budget, only, without=frozenset(without), cpu_time=args.clock == "cpu")


def parse_device(text: str) -> torch.device:
    """``cpu``, ``cuda`` (which becomes the current one) or ``cuda:N``.

    Raises:
        ValueError: it is none of these, or there are not so many.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cpu" or not torch.cuda.is_available():
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of the {torch.cuda.device_count()} CUDA devices, got {text!r}")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def cases_of(name: str, args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The cases of one benchmark that `--where` leaves.

    Raises:
        ValueError: `--where` is no list of KEY=VALUE.
    """
    odd = [item for item in args.where if "=" not in item]
    if odd:
        raise ValueError(f"--where must be KEY=VALUE, got {odd[0]!r}")
    parameters = dict(item.split("=", 1) for item in args.where)
    module = importlib.import_module(f"benchmarks.{name}")
    cases = module.cases(device, grid_of(args)) if args.run is None else module.trained_cases(args.run)
    for case in cases:
        if all(str(case.parameters.get(key)) == value for key, value in parameters.items()):
            yield case


def check_where(names: Sequence[str], args: argparse.Namespace, device: torch.device) -> None:
    """Raise a `ValueError` where `--where` leaves no case of any of these benchmarks."""
    if args.where and not any(True for name in names for _ in cases_of(name, args, device)):
        raise ValueError(f"--where must leave a case of {', '.join(names)}, got {' '.join(args.where)}")


def check_only(names: Sequence[str], args: argparse.Namespace, device: torch.device) -> None:
    """Raise a `ValueError` where `--only` names what none of the cases that were run has."""
    rows = [row for name in names for row in _rows(results_file(name, args, device))]
    unknown = sorted(set(args.only or ()) - {row["contestant"] for row in rows})
    if unknown:
        raise ValueError(f"--only must name providers of {', '.join(names)}, got {unknown[0]!r}, which no case has")


def _rows(path: Path) -> list[Row]:
    return read_file(path) if path.is_file() else []


def run(name: str, args: argparse.Namespace, settings: Settings, done: int = 0) -> int:
    """Runs one benchmark; the file is written anew after every case. Returns how many of ours are wrong or failed.

    With `--only` or `--where` the file keeps its rows of other providers and cases.

    Args:
        name: the benchmark.
        args: the command line.
        settings: how.
        done: so many cases are in the file already.
    """
    path = results_file(name, args, settings.device)
    partial = args.only is not None or bool(args.where)
    rows: list[Row] = _rows(path) if done or partial else []
    failures = count_failures(rows) if done else 0
    for number, case in enumerate(cases_of(name, args, settings.device)):
        if number < done:
            continue
        start = time.perf_counter()
        try:
            case_rows = run_case(case, settings)
        except DeviceLost as lost:
            raise DeviceLost(*lost.args, f"{name}:{number}") from lost
        for row in case_rows:
            row["grid"] = grid_of(args)
        add_ceilings(case_rows, settings.device)
        if partial:
            again = {row["contestant"] for row in case_rows}
            parameters = json.loads(json.dumps(rounded(case.parameters)))  # as a file has them
            rows = [row for row in rows if row["contestant"] not in again or row["case"] != parameters]
        rows += case_rows
        write(path, rows)
        print(f"\n{name}  {json.dumps(case.parameters)}  ({time.perf_counter() - start:.1f} s)")
        for row in case_rows:
            print("  " + line(row), flush=True)
        failures += count_failures(case_rows)
    if rows:
        print(f"\nwritten to {path}")
    return failures


def results_file(name: str, args: argparse.Namespace, device: torch.device) -> Path:
    """Where the rows of a benchmark go."""
    parts = [name, device.type, slug(describe(device)["device"])]
    parts += ["quick"] if args.quick else []
    # limits are promised for one thread and for two, so neither run may replace the other's rows
    parts += ["gate", f"threads{torch.get_num_threads()}"] if args.gate else []
    parts += ["run"] if args.run is not None else []
    return args.results / f"{'-'.join(parts)}.json"


def count_failures(rows: list[Row]) -> int:
    """How many rows of ours are wrong or failed."""
    return sum(row["status"] in ("wrong", "failed") and row["contestant"].startswith("ntpseg") for row in rows)


def add_ceilings(rows: list[Row], device: torch.device) -> None:
    """Adds the measured rates of the device, for rooflines and the model FLOPs utilisation."""
    for row in rows:
        if "seconds" in row:
            flops = matmul_flops(device, getattr(torch, row["dtype"]))
            row["ceiling"] = {"flops_per_second": flops, "bytes_per_second": copy_bytes(device)}


def print_machine(device: torch.device) -> None:
    """One line: device, commit and versions."""
    machine = describe(device)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['device']} (driver {machine['driver']}), commit {machine['commit']}, {versions}")


def line(row: Row) -> str:
    """One row for the terminal."""
    name = f"{row['contestant']:<34}"
    if "seconds" not in row:
        return f"{name} {row['status']}: {row.get('reason') or row.get('error')}"
    seconds, ratio = row["seconds"], row["ratio"]
    text = (
        f"{name} {seconds['median'] * 1e3:10.3f} ms  x {ratio['median']:7.3f} [{ratio['p25']:.3f}, {ratio['p75']:.3f}]"
    )
    if "memory" in row:
        text += f"  + {row['memory']['delta'] / 2**20:8.1f} MiB of {row['memory']['absolute'] / 2**20:.0f}"
    if row["work"]["tokens"]:
        text += f"  {row['work']['tokens'] / seconds['median']:,.0f} tokens/s"
    if fraction := ceiling_fraction(row):
        text += f"  {fraction} of the FLOP ceiling"
    if row.get("error"):
        text += f"  error {max(row['error'].values()):.1e}"
    for other, measured in row.get("limits", {}).items():
        text += f"  {other}: limit {'met' if measured['met'] else 'NOT MET'}"
    return text
