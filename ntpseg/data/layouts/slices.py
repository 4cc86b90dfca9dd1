"""The columns of a table that say where an image lies in a volume, and whether a volume's rows fit together."""

from __future__ import annotations

from dataclasses import dataclass, field

from ntpseg.data import problems
from ntpseg.data.records import SlicePlace
from ntpseg.data.tables import Row

PLACE_COLUMNS = ("volume", "axis", "slice", "slice_mm", "row_mm", "column_mm", "window", "modality", "structure")
# What all slices of a volume have in common, as `SlicePlace` and the table call it.
_COMMON = ("axis", "slice_mm", "row_mm", "column_mm", "modality")
# Tables are written with few digits.
_TOLERANCE = 1e-3


def read_place(row: Row) -> SlicePlace | None:
    """What the columns `PLACE_COLUMNS` of a row say; None where all of them are empty or absent.

    Without a volume there is no axis and no slice, whatever columns of these names hold.

    Raises:
        ValueError: a slice without axis or number, or a cell that is no positive number of millimetres.
    """
    volume = row.get("volume", "")
    slice_mm, row_mm, column_mm = (_number(name, row.get(name, "")) for name in ("slice_mm", "row_mm", "column_mm"))
    window, modality, structure = (row.get(name, "") for name in ("window", "modality", "structure"))
    if not any((volume, window, modality, structure)) and slice_mm is row_mm is column_mm is None:
        return None
    axis, index = (row.get("axis", "").lower(), _index(row.get("slice", ""))) if volume else ("", -1)
    return SlicePlace(volume, axis, index, slice_mm, row_mm, column_mm, window, modality, structure)


def _number(name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number > 0, got {text!r}") from None


def _index(text: str) -> int:
    try:
        # A column with empty cells comes out of pandas as floats.
        return int(text.removesuffix(".0"))
    except ValueError:
        raise ValueError(f"slice must be an integer >= 0 in a row with a volume, got {text!r}") from None


@dataclass(slots=True)
class _Volume:
    place: SlicePlace
    subject: str
    row: int
    seen: dict[tuple[int, str, str], int] = field(default_factory=dict)


class VolumeRows:
    """The volumes of a table, as far as its rows have been read."""

    def __init__(self) -> None:
        self._volumes: dict[str, _Volume] = {}

    def add(self, place: SlicePlace, text: str, subject: str, row: int) -> tuple[str, str]:
        """Add a row, unless it does not fit to the earlier ones of its volume.

        Returns:
            The kind of the problem and what is wrong; two empty texts where nothing is.
        """
        volume = self._volumes.setdefault(place.volume, _Volume(place, subject, row))
        if subject != volume.subject:
            return problems.BAD_ROW, f"its volume is another subject's in row {volume.row}; a volume has one subject"
        for name in _COMMON:
            first, value = getattr(volume.place, name), getattr(place, name)
            if not _same(first, value):
                shown = ", ".join(f"{'nothing' if v in (None, '') else v}" for v in (first, value))
                where = f"{name} must be the same in all rows of volume {place.volume!r}"
                return problems.BAD_ROW, f"{where}, got {shown} in rows {volume.row} and {row}"
        key = (place.index, place.structure, text)
        if key in volume.seen:
            other = f"row {volume.seen[key]} has slice {place.index} of volume {place.volume!r} with this sentence too"
            return problems.DUPLICATE, f"{other}; the first counts"
        volume.seen[key] = row
        return "", ""


def _same(first: object, second: object) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) <= _TOLERANCE * max(first, second)
    return first == second
