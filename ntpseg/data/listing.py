"""What a layout's reader gives back: the usable rows, and what is wrong with the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ntpseg.data.problems import Problem
from ntpseg.data.records import Record


@dataclass(slots=True)
class Listing:
    """The rows of a data set whose files exist (none of them opened yet), and the problems of the rest."""

    root: Path
    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def report(self, kind: str, split: str, name: str | Path, detail: str = "") -> None:
        """Note a problem; paths are shortened to what lies below the data set's folder."""
        self.problems.append(Problem(kind, split, self.short(name), detail))

    def short(self, name: str | Path) -> str:
        """A path relative to the data set where it lies inside it."""
        if isinstance(name, Path) and name.is_relative_to(self.root):
            return name.relative_to(self.root).as_posix()
        return str(name)
