"""What can be wrong with a data set, and the error that lists all of it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

MISSING_IMAGE = "caption without image"
MISSING_MASK = "missing mask"
MISSING_TEXT = "image without caption"
MISSING_TABLE = "missing table"
UNMATCHED_MASK = "mask without image"
DUPLICATE = "duplicate row"
NO_SPLIT = "row in no split"
UNREADABLE = "unreadable file"
SIZE_MISMATCH = "size mismatch"
EMPTY_MASK = "empty mask"
SEVERAL_CLASSES = "several classes"
BAD_ROW = "malformed row"
SHARED_PATIENT = "patient in two splits"
SHARED_IMAGE = "image in two splits"

# Worth a look, but nothing that stops training.
NEGATIVE = "case without a finding"
MOSTLY_FOREGROUND = "mostly foreground"
ORIENTATION = "turned image"
OUTLIERS = "pixels far outside"
UNUSUAL_MASK = "unusual mask"
GAP = "volume with gaps"
AMBIGUOUS = "sentence for two masks"


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: one of this module's constants, such as "missing mask".
        split: "train", "val", "test", or "" where it belongs to none.
        name: file or table row, relative to the data set where possible.
        detail: what was found and what was expected.
    """

    kind: str
    split: str
    name: str
    detail: str = ""


class DataProblems(ValueError):
    """A data set cannot be used as it is; `problems` holds everything found, `str()` is the table."""

    def __init__(self, path: object, problems: Sequence[Problem]) -> None:
        self.path = str(path)
        self.problems = list(problems)
        super().__init__(self.path, self.problems)

    def __str__(self) -> str:
        table = render(problem_table(self.problems, title=f"What is wrong with {self.path}", limit=50))
        return f"{summary(self.problems)}\n{table}\nRepair the data, or leave these out with --skip-bad."


def summary(problems: Sequence[Problem], noun: str = "problem") -> str:
    """One line, such as "3 problems: 2 missing mask, 1 empty mask"."""
    counts = Counter(problem.kind for problem in problems)
    parts = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
    return f"{len(problems)} {noun}{'' if len(problems) == 1 else 's'}{': ' if parts else ''}{parts}"


def problem_table(problems: Sequence[Problem], title: str, limit: int | None = None) -> Table:
    """One table of all problems, or of the first `limit` with a last row that says how many more there are."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_lines=False)
    for column, fold in (("problem", False), ("split", False), ("file or row", True), ("what was found", True)):
        table.add_column(column, overflow="fold" if fold else "ellipsis", no_wrap=not fold)
    for problem in problems[:limit]:
        table.add_row(*map(Text, (problem.kind, problem.split, problem.name, problem.detail)))
    if limit is not None and len(problems) > limit:
        table.add_row("...", "", f"and {len(problems) - limit} more", "ntpseg data check lists all")
    return table


def render(table: Table) -> str:
    """The table as plain text of 120 columns, for an error message."""
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=120, color_system=None, force_terminal=False).print(table)
    return stream.getvalue().rstrip()
