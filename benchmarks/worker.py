"""One revision's side of a comparison: builds a case, then runs one round whenever it is told to.

Reads JSON commands from stdin, one a line, and answers each with one line on what was stdout at its start.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import torch

from benchmarks import suite
from benchmarks.harness.comparison import capture_graphs, checked_step
from benchmarks.harness.environment import describe
from benchmarks.harness.timing import Clock


class Worker:
    """Holds the steps of the case at hand."""

    def __init__(self, arguments: list[str]) -> None:
        options = argparse.ArgumentParser()
        suite.add_options(options)
        self.args = options.parse_args(arguments)
        if self.args.threads:
            torch.set_num_threads(self.args.threads)
        self.settings = suite.run_settings(self.args)
        self.clock = Clock(self.settings.device, self.settings.cpu_time)
        self.calls: dict[str, Any] = {}
        self.repeats: dict[str, int] = {}

    def cases(self, name: str) -> dict[str, Any]:
        """The grid of a benchmark."""
        self.grid = list(suite.cases_of(name, self.args, self.settings.device))
        return {"cases": [case.parameters for case in self.grid], **describe(self.settings.device)}

    def build(self, index: int) -> dict[str, Any]:
        """Checks ours; answers with the names that are right and why others are not there."""
        self.calls.clear()
        self.comparison = self.grid[index].build(self.settings)
        missing = {}
        for name, provider in self.comparison.providers.items():
            if not name.startswith("ntpseg"):
                continue
            row: dict[str, Any] = {"contestant": name}
            step = checked_step(provider, row)
            if step is None:
                missing[name] = f"{row['status']}: {row.get('reason')}"
            else:
                self.calls[name] = step
        if self.comparison.release is not None:
            self.comparison.release()
        self.repeats = dict.fromkeys(self.calls, 1)
        if self.comparison.graphs and self.clock.cuda:
            capture_graphs(self.calls, self.repeats, self.clock)
        return {"ready": list(self.calls), "missing": missing}

    def round(self, names: list[str]) -> dict[str, Any]:
        """Seconds of one call each."""
        times = self.clock.round([self.calls[name] for name in names])
        return {"seconds": [seconds / self.repeats[name] for name, seconds in zip(names, times, strict=True)]}


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints goes to stderr
    worker = Worker(sys.argv[1:])
    for text in sys.stdin:
        command, *arguments = json.loads(text)
        try:
            answer = getattr(worker, command)(*arguments)
        except Exception as error:  # the other side must hear of it, whatever it is
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
