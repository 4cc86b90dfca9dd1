"""One revision's side of a comparison: builds a case, then runs one round whenever it is told to.

Reads JSON commands from stdin, one a line, and answers each with one line on what was stdout at its start.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from benchmarks.command import cases_of, parser, settings_of
from benchmarks.harness import Case, Settings
from benchmarks.harness.contest import admit, capture
from benchmarks.harness.environment import describe
from benchmarks.harness.timing import Clock


class Worker:
    """Holds the steps of the case at hand."""

    def __init__(self, arguments: list[str]) -> None:
        import torch

        self.given = parser().parse_args(arguments)
        if self.given.threads:
            torch.set_num_threads(self.given.threads)
        self.settings: Settings = settings_of(self.given)
        self.clock = Clock(self.settings.device)
        self.calls: dict[str, Any] = {}
        self.repeats: dict[str, int] = {}

    def cases(self, name: str) -> dict[str, Any]:
        """The grid of a benchmark."""
        self.grid: list[Case] = list(cases_of(name, self.given, self.settings.device))
        return {"cases": [case.parameters for case in self.grid], **describe(self.settings.device)}

    def build(self, index: int) -> dict[str, Any]:
        """Checks ours; answers with the names that are right and why others are not there."""
        self.calls.clear()
        self.contest = self.grid[index].build(self.settings)
        missing = {}
        for name, contestant in self.contest.contestants.items():
            if not name.startswith("ntpseg"):
                continue
            row: dict[str, Any] = {"contestant": name}
            step = admit(contestant, row)
            if step is None:
                missing[name] = f"{row['status']}: {row.get('reason')}"
            else:
                self.calls[name] = step
        if self.contest.forget is not None:
            self.contest.forget()
        self.repeats = dict.fromkeys(self.calls, 1)
        if self.contest.graphs and self.clock.cuda:
            capture(self.calls, self.repeats, self.clock)
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
