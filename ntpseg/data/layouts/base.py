"""What a layout of data sets is, and what its reader returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ntpseg.data.problems import Problem
from ntpseg.data.records import Record


@dataclass(slots=True)
class Listing:
    """The rows of a data set whose files exist (none of them opened yet), and the problems of the others.

    Attributes:
        root: the data set's folder.
        records: the usable rows, in the order of the tables.
        problems: what is wrong with the other rows and files.
        patients: the subjects that the tables state, in a column of their own or by the volume; those of other
            records are guesses from names.
    """

    root: Path
    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    patients: set[str] = field(default_factory=set)

    def report(self, kind: str, split: str, name: str | Path, detail: str = "") -> None:
        """Note a problem; paths are shortened to what lies below the data set's folder."""
        self.problems.append(Problem(kind, split, self.short(name), detail))

    def short(self, name: str | Path) -> str:
        """A path relative to the data set where it lies inside it."""
        if isinstance(name, Path) and name.is_relative_to(self.root):
            return name.relative_to(self.root).as_posix()
        return str(name)


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout of data sets: how to recognise it and how to read it.

    Attributes:
        name: as in ``data.layout`` of a run and ``--layout``.
        matches: whether the folder or file at a path has this layout.
        read: lists the data set at a path, opening its tables, but no image. Raises `ValueError` where the path does
            not have this layout.
        describe: what distinguishes it, for errors and help, such as "prompt/train.csv".
        verify: reads all of the data set at a path and raises `ValueError` where its files are not those that were
            written; None: the layout has no hashes.
    """

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], Listing]
    describe: str
    verify: Callable[[Path], None] | None = None
