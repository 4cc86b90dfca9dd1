"""The command line of the suite: which benchmarks, where, how long, and what is done with the rows."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import suite
from benchmarks.harness import DeviceLost
from benchmarks.harness.rows import RESULTS, read_file


def parser() -> argparse.ArgumentParser:
    """All options."""
    options = argparse.ArgumentParser(prog="ntpseg bench", description=__doc__)
    options.add_argument("what", nargs="?", default="all", choices=(*suite.BENCHMARKS, "all", "report", "tune"))
    suite.add_options(options)
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON rows")
    options.add_argument("--docs", type=Path, help="Markdown file that `report` writes, one page a machine beside it")
    options.add_argument("--base", metavar="REV", help="compare the package with this revision, in turns")
    options.add_argument("--threshold", type=float, default=0.05, help="--base: how much slower is a failure")
    options.add_argument("--resume", nargs="+", metavar=("BENCHMARK:CASE", "WITHOUT"), help=argparse.SUPPRESS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where something of ours is wrong or slower than `--base` allows, 2 for bad usage."""
    if (sys.argv[1:] if arguments is None else list(arguments))[:1] == ["tune"]:  # it has options of its own
        from benchmarks import tune

        return tune.main(sys.argv[2:] if arguments is None else arguments[1:])
    args = parser().parse_args(arguments)
    if args.what == "tune":
        raise ValueError("tune must be the first argument, got options before it")
    if args.what == "report":
        from benchmarks.report import write_report

        write_report(args.results, args.docs)
        return 0
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be >= 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    names = suite.benchmark_names(args)
    settings = suite.run_settings(args, (args.resume or [])[1:])
    suite.check_where(names, args, settings.device)
    if args.base:
        from benchmarks.regression import compare_with_base

        return compare_with_base(args, names, settings.budget)
    suite.print_machine(settings.device)
    failures, done = 0, 0
    if args.resume:
        current, _, number = args.resume[0].partition(":")
        place, done = names.index(current), int(number)
        finished = [suite.results_file(name, args, settings.device) for name in names[:place]]
        failures = sum(suite.count_failures(read_file(path)) for path in finished)
        names = names[place:]
    for name in names:
        try:
            failures += suite.run(name, args, settings, done)
        except DeviceLost as lost:
            _restart(list(sys.argv[1:] if arguments is None else arguments), args, lost)
        done = 0
    suite.check_only(names, args, settings.device)
    return 1 if failures else 0


def _restart(arguments: list[str], args: argparse.Namespace, lost: DeviceLost) -> None:
    """Goes on at the same case in a new process, without the provider that left this one without its device."""
    name, place = lost.args
    print(f"\n{name} left the device unusable; going on without it in a new process", flush=True)
    if args.resume:
        arguments = arguments[: arguments.index("--resume")]
    command = [sys.executable, "-m", "benchmarks", *arguments, "--resume", place, name, *(args.resume or [])[1:]]
    _replace_process(command)


def _replace_process(command: list[str]) -> None:
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the driver's own files too: open ones would keep the GPU's memory
    os.execv(command[0], command)
