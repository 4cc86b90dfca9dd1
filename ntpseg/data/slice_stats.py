"""What a data set's table says of volumes: counted by split and modality, and what is worth a look."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ntpseg.data import problems
from ntpseg.data.problems import Problem
from ntpseg.data.records import SPLITS, Record, SlicePlace

if TYPE_CHECKING:
    from rich.table import Table

Range = tuple[float, float]
_LISTED = 4


@dataclass(frozen=True, slots=True)
class SliceStats:
    """The pairs of one split and modality.

    Attributes:
        split: "train", "val" or "test".
        modality: such as "CT"; "" where the table does not say.
        volumes: number of volumes.
        slices: number of different slices of them, and of 2-D images.
        pairs: number of records.
        empty: number of records whose mask holds no finding.
        axes: along which the volumes are sliced.
        slice_mm, row_mm, column_mm: smallest and largest; None where none is known.
        windows: as the table names them.
        unknown: number of records whose rows or columns have no known millimetres.
    """

    split: str
    modality: str
    volumes: int
    slices: int
    pairs: int
    empty: int
    axes: tuple[str, ...]
    slice_mm: Range | None
    row_mm: Range | None
    column_mm: Range | None
    windows: tuple[str, ...]
    unknown: int


def slice_stats(records: Iterable[Record], empty: Collection[Record]) -> list[SliceStats]:
    """Statistics of every split and modality; none where no table says anything of places.

    Args:
        records: the data set.
        empty: those of them whose mask holds no finding.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.split, record.place.modality if record.place else ""), []).append(record)
    if not any(record.place for group in groups.values() for record in group):
        return []
    without = set(empty)
    return [
        _stats(*key, groups[key], without) for key in sorted(groups, key=lambda key: (SPLITS.index(key[0]), key[1]))
    ]


def _stats(split: str, modality: str, records: Sequence[Record], empty: set[Record]) -> SliceStats:
    places = [record.place or SlicePlace() for record in records]

    def span(name: str) -> Range | None:
        values = [value for place in places if (value := getattr(place, name)) is not None]
        return (min(values), max(values)) if values else None

    return SliceStats(
        split=split,
        modality=modality,
        volumes=len({place.volume for place in places if place.volume}),
        slices=len({(p.volume, p.index) if p.volume else r.image for p, r in zip(places, records)}),
        pairs=len(records),
        empty=sum(record in empty for record in records),
        axes=tuple(sorted({place.axis for place in places if place.axis})),
        slice_mm=span("slice_mm"),
        row_mm=span("row_mm"),
        column_mm=span("column_mm"),
        windows=tuple(sorted({place.window for place in places if place.window})),
        unknown=sum(place.pixel_mm is None for place in places),
    )


def slice_table(stats: Sequence[SliceStats]) -> Table:
    """The statistics as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Volumes")
    for name in ("split", "modality"):
        table.add_column(name)
    for name in ("volumes", "slices", "pairs", "without a finding"):
        table.add_column(name, justify="right")
    for name in ("axes", "slice, row, column in mm", "windows"):
        table.add_column(name, overflow="fold")
    for row in stats:
        distances = ", ".join(map(_span, (row.slice_mm, row.row_mm, row.column_mm)))
        if row.unknown:
            distances += f" ({row.unknown} pairs without)"
        windows = ", ".join(row.windows[:_LISTED]) + (", ..." if len(row.windows) > _LISTED else "")
        counts = map(str, (row.volumes, row.slices, row.pairs, row.empty))
        cells = (row.split, row.modality or "unknown", *counts, ", ".join(row.axes), distances, windows)
        table.add_row(*map(Text, cells))
    return table


def _span(values: Range | None) -> str:
    if values is None:
        return "?"
    return f"{values[0]:.4g}" if values[0] == values[1] else f"{values[0]:.4g}..{values[1]:.4g}"


def volume_notes(records: Iterable[Record]) -> list[Problem]:
    """A note for each volume that lacks slices between its first and its last; every second or third is no gap."""
    volumes: dict[str, tuple[str, set[int]]] = {}
    for record in records:
        if record.place is not None and record.place.volume:
            volumes.setdefault(record.place.volume, (record.split, set()))[1].add(record.place.index)
    notes = []
    for name, (split, found) in volumes.items():
        indices = sorted(found)
        steps = [b - a for a, b in itertools.pairwise(indices)]
        step = min(steps, default=1)
        gaps = [(a, b) for a, b in itertools.pairwise(indices) if b - a > step]
        if gaps:
            first = f"between slices {gaps[0][0]} and {gaps[0][1]}" + (", ..." if len(gaps) > 1 else "")
            number = sum((b - a - 1) // step for a, b in gaps)
            detail = f"{number} of its slices {indices[0]}..{indices[-1]} {'is' if number == 1 else 'are'} not here"
            notes.append(Problem(problems.GAP, split, name, f"{detail} ({first})"))
    return notes
