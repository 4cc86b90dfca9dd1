"""The command line of the suite: which benchmarks, where, how long, and what is done with the rows."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.harness import Case, DeviceLost, Settings, run_case
from benchmarks.harness.ceilings import copy_bytes, matmul_flops
from benchmarks.harness.environment import describe
from benchmarks.harness.rows import RESULTS, Row, read_file, write
from benchmarks.harness.timing import Effort
from benchmarks.report.tables import share_of_ceiling

BENCHMARKS = ("loss", "topn", "attention", "decode", "train")
_EFFORT = {
    ("cpu", True): Effort(seconds=0.2, least=3, most=5, warmup=1),
    ("cpu", False): Effort(seconds=10.0, least=5, most=200, warmup=1),
    ("cuda", True): Effort(seconds=2.0, least=7, most=200, warmup=1),
    ("cuda", False): Effort(seconds=4.0, least=15, most=500, warmup=3),
}


def parser() -> argparse.ArgumentParser:
    """All options."""
    it = argparse.ArgumentParser(prog="ntpseg bench", description=__doc__)
    it.add_argument("what", nargs="?", default="all", choices=(*BENCHMARKS, "all", "report"))
    it.add_argument("--quick", action="store_true", help="a small grid and few rounds")
    it.add_argument("--device", help="cpu or cuda; a GPU if there is one")
    it.add_argument("--threads", type=int, help="CPU threads; PyTorch's own choice by default")
    it.add_argument("--seconds", type=float, help="time budget of the rounds of one case")
    it.add_argument("--only", nargs="+", metavar="NAME", help="these contestants and the reference")
    it.add_argument("--where", nargs="+", default=[], metavar="KEY=VALUE", help="only cases with these parameters")
    it.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON rows")
    it.add_argument("--docs", type=Path, help="Markdown file whose benchmark section `report` writes anew")
    it.add_argument("--base", metavar="REV", help="compare the package with this revision, in turns")
    it.add_argument("--threshold", type=float, default=0.05, help="--base: how much slower is a failure")
    it.add_argument("--resume", nargs="+", metavar=("BENCHMARK:CASE", "WITHOUT"), help=argparse.SUPPRESS)
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where something of ours is wrong or slower than `--base` allows, 2 for bad usage."""
    given = parser().parse_args(arguments)
    if given.what == "report":
        from benchmarks.report import write_report

        write_report(given.results, given.docs)
        return 0
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.base:
        from benchmarks.compare import compare

        return compare(given)
    settings = settings_of(given)
    print_machine(settings.device)
    failures, names = 0, names_of(given.what)
    done = 0
    if given.resume:
        at, _, number = given.resume[0].partition(":")
        place, done = names.index(at), int(number)
        failures = sum(_bad(read_file(file_of(name, given, settings.device))) for name in names[:place])
        names = names[place:]
    for name in names:
        try:
            failures += run(name, given, settings, done)
        except DeviceLost as lost:
            _start_again(list(sys.argv[1:] if arguments is None else arguments), given, lost)
        done = 0
    return 1 if failures else 0


def _start_again(arguments: list[str], given: argparse.Namespace, lost: DeviceLost) -> None:
    """Goes on at the same case in a new process, without the contestant that left this one without its device."""
    name, place = lost.args
    print(f"\n{name} left the device unusable; going on without it in a new process", flush=True)
    if given.resume:
        arguments = arguments[: arguments.index("--resume")]
    command = [sys.executable, "-m", "benchmarks", *arguments, "--resume", place, name, *(given.resume or [])[1:]]
    _become(command)


def _become(command: list[str]) -> None:
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the driver's own files too: open ones would keep the GPU's memory
    os.execv(command[0], command)


def names_of(what: str) -> tuple[str, ...]:
    """The benchmarks that "all" or one name stands for."""
    return BENCHMARKS if what == "all" else (what,)


def settings_of(given: argparse.Namespace) -> Settings:
    """Device and effort.

    Raises:
        ValueError: the device is not there.
    """
    name = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but PyTorch finds no CUDA device here")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    effort = _EFFORT[device.type, given.quick]
    if given.seconds is not None:
        effort = Effort(given.seconds, effort.least, effort.most, effort.warmup)
    without = frozenset((given.resume or [])[1:])
    return Settings(device, effort, frozenset(given.only) if given.only else None, without=without)


def cases_of(name: str, given: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The cases of one benchmark that `--where` leaves."""
    wanted = dict(item.split("=", 1) for item in given.where)
    for case in importlib.import_module(f"benchmarks.{name}").cases(device, given.quick):
        if all(str(case.parameters.get(key)) == value for key, value in wanted.items()):
            yield case


def run(name: str, given: argparse.Namespace, settings: Settings, done: int = 0) -> int:
    """Runs one benchmark; the file is written anew after every case. Returns how many of ours are wrong or failed.

    Args:
        name: the benchmark.
        given: the command line.
        settings: how.
        done: so many cases are in the file already.
    """
    path = file_of(name, given, settings.device)
    rows: list[Row] = read_file(path) if done else []
    bad = _bad(rows)
    for number, case in enumerate(cases_of(name, given, settings.device)):
        if number < done:
            continue
        start = time.perf_counter()
        try:
            found = run_case(case, settings)
        except DeviceLost as lost:
            raise DeviceLost(*lost.args, f"{name}:{number}") from lost
        with_ceilings(found, settings.device)
        rows += found
        write(path, rows)
        print(f"\n{name}  {json.dumps(case.parameters)}  ({time.perf_counter() - start:.1f} s)")
        for row in found:
            print("  " + line(row), flush=True)
        bad += _bad(found)
    if rows:
        print(f"\nwritten to {path}")
    return bad


def file_of(name: str, given: argparse.Namespace, device: torch.device) -> Path:
    """Where the rows of a benchmark go."""
    slug = re.sub(r"[^a-z0-9]+", "-", describe(device)["device"].split(",")[0].lower()).strip("-")
    return given.results / f"{name}-{device.type}-{slug}{'-quick' if given.quick else ''}.json"


def _bad(rows: list[Row]) -> int:
    return sum(row["status"] in ("wrong", "failed") and row["contestant"].startswith("ntpseg") for row in rows)


def with_ceilings(rows: list[Row], device: torch.device) -> None:
    """Adds the measured rates of the device, for rooflines and the model FLOPs utilisation."""
    for row in rows:
        if "seconds" in row:
            flops = matmul_flops(device, getattr(torch, row["dtype"]))
            row["ceiling"] = {"flops_per_second": flops, "bytes_per_second": copy_bytes(device)}


def print_machine(device: torch.device) -> None:
    """One line: device, commit and versions."""
    it = describe(device)
    versions = ", ".join(f"{name} {version}" for name, version in it["versions"].items())
    print(f"{it['device']} (driver {it['driver']}), commit {it['commit']}, {versions}")


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
    if share := share_of_ceiling(row):
        text += f"  {share} of the FLOP ceiling"
    if row.get("error"):
        text += f"  error {max(row['error'].values()):.1e}"
    return text
