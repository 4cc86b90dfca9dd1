"""``--base REV``: this working tree against another revision, both running in turns in one go.

The revision is checked out into a temporary folder, and one process per revision builds each case and checks it; then
the two take turns, one round each, and the ratio is taken round by round. The benchmarks themselves are this tree's on
both sides. A provider fails where the median ratio is above the threshold and the interval around it excludes 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.environment import ROOT
from benchmarks.harness.rows import Row, write
from benchmarks.harness.timing import Budget


class Side:
    """A worker process of one revision.

    Args:
        package: folder that holds its ``ntpseg``.
        arguments: the worker's options.
    """

    def __init__(self, package: Path, arguments: Sequence[str]) -> None:
        path = os.pathsep.join(filter(None, [str(package), str(ROOT), os.environ.get("PYTHONPATH")]))
        # -P: the working directory must not come before the package of this side
        command = [sys.executable, "-P", "-m", "benchmarks.worker", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, command: str, *arguments: Any) -> dict[str, Any]:
        """One command and its answer.

        Raises:
            RuntimeError: the worker failed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        text = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
            text = self.process.stdout.readline()
        if not text:
            raise RuntimeError("worker exited early; its own message is above")
        answer = json.loads(text)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


def compare_with_base(args: argparse.Namespace, names: Sequence[str], budget: Budget) -> int:
    """Prints and writes the comparison; returns 1 where something became slower than the threshold allows.

    Args:
        args: the command line.
        names: of the benchmarks.
        budget: of one provider of one case.

    Raises:
        ValueError: the revision does not exist.
    """
    arguments = _worker_arguments(args)
    rows: list[Row] = []
    with base_package(args.base) as package:
        sides = [Side(ROOT, arguments), Side(package, arguments)]
        try:
            for name in names:
                for row in _benchmark(name, args, sides, budget):
                    rows.append(row)
                    print(_line(row), flush=True)
                    write(args.results / f"compare-{row['kind']}.json", rows)
        finally:
            for side in sides:
                side.close()
    slower = [row for row in rows if row["slower"]]
    print(f"{len(rows)} comparisons, {len(slower)} slower than {args.base} by more than {args.threshold:.0%}")
    if not rows:
        print("nothing of ours could run on both sides")
    return 1 if slower or not rows else 0


@contextlib.contextmanager
def base_package(revision: str) -> Iterator[Path]:
    """A folder that holds nothing but the revision's ``ntpseg``, native operators included where this tree has them."""
    git = ["git", "-C", str(ROOT)]
    resolved = subprocess.run([*git, "rev-parse", "--verify", f"{revision}^{{commit}}"], capture_output=True, text=True)
    if resolved.returncode:
        raise ValueError(f"base must be a revision of {ROOT}, got {revision!r}")
    commit = resolved.stdout.strip()
    folder = Path(tempfile.mkdtemp(prefix="ntpseg-base-"))
    tree, package = folder / "tree", folder / "package"
    try:
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(tree), commit], check=True)
        _native(tree, git, commit)
        package.mkdir()
        (package / "ntpseg").symlink_to(tree / "ntpseg")
        yield package
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(tree)], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _native(tree: Path, git: list[str], revision: str) -> None:
    """Copies the native operators where their sources are the same, and builds them where not."""
    built = list((ROOT / "ntpseg").glob("_C*.so"))
    if not built or os.environ.get("NTPSEG_DISABLE_NATIVE") == "1":
        return
    if subprocess.run([*git, "diff", "--quiet", revision, "--", "csrc", "setup.py"]).returncode == 0:
        for path in built:
            shutil.copy2(path, tree / "ntpseg" / path.name)
        return
    print("building the native operators of the base revision ...", flush=True)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True)


def _benchmark(name: str, args: argparse.Namespace, sides: list[Side], budget: Budget) -> Iterator[Row]:
    grids = [side.ask("cases", name) for side in sides]
    environment = {key: value for key, value in grids[0].items() if key != "cases"}
    for index, parameters in enumerate(grids[0]["cases"]):
        built = [side.ask("build", index) for side in sides]
        names = [x for x in built[0]["ready"] if x in built[1]["ready"] and (not args.only or x in args.only)]
        for which, answer in zip(("this tree", args.base), built, strict=True):
            for missing, reason in answer["missing"].items():
                if not all(missing in side["missing"] for side in built):
                    print(f"{name} {missing}: not on the side of {which}: {reason}")
        if not names:
            continue
        now, base = _turns(sides, names, budget)
        for provider in names:
            ratios = [a / b for a, b in zip(now[provider], base[provider], strict=True)]
            low, middle, high = median_interval(ratios)
            yield {
                "compared": name,
                "case": parameters,
                "name": provider,
                **environment,
                "base": args.base,
                "base_commit": grids[1]["commit"],
                "seconds": {"now": statistics.median(now[provider]), "base": statistics.median(base[provider])},
                "ratio": {"median": middle, "low": low, "high": high, "rounds": len(ratios)},
                "slower": middle > 1 + args.threshold and low > 1,
            }


def _turns(
    sides: list[Side], names: list[str], budget: Budget
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    seconds: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in sides]
    for _ in range(budget.warmup):
        for side in sides:
            side.ask("round", names)
    deadline = time.perf_counter() + budget.seconds * len(names)
    turn = 0
    while turn < max(budget.min_rounds, 7) or (turn < budget.max_rounds and time.perf_counter() < deadline):
        for which in (0, 1) if turn % 2 else (1, 0):
            for name, spent in zip(names, sides[which].ask("round", names)["seconds"], strict=True):
                seconds[which][name].append(spent)
        turn += 1
    return seconds[0], seconds[1]


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median between the two order statistics that hold it with about 95 % certainty."""
    ordered = sorted(values)
    place = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))))
    return ordered[place], statistics.median(ordered), ordered[-1 - place]


def _worker_arguments(args: argparse.Namespace) -> list[str]:
    arguments = [f"--{name}" for name in ("quick", "gate") if getattr(args, name)]
    for name in ("device", "threads", "clock", "seconds", "run"):
        if getattr(args, name) is not None:
            arguments += [f"--{name}", str(getattr(args, name))]
    return arguments + (["--where", *args.where] if args.where else [])


def _line(row: Row) -> str:
    ratio, seconds = row["ratio"], row["seconds"]
    verdict = "SLOWER" if row["slower"] else "faster" if ratio["high"] < 1 else "same within noise"
    return (
        f"{row['compared']} {json.dumps(row['case'])} {row['name']}: {seconds['now'] * 1e3:.3f} ms against "
        f"{seconds['base'] * 1e3:.3f} ms, x {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] {verdict}"
    )
