"""The columns of LViT's and LanGuideMedSeg's tables, under the names that are in use for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ntpseg.data.tables import Row, Table, is_sentence, read_table

IMAGE = ("image", "image_name", "img", "file_name", "filename", "image_path", "path", "name")
DESCRIPTION = ("description", "text", "caption", "sentence", "prompt", "report")
# Of further sentences of the same mask: Description_2, "Description 3", Description4; Description_zh is none of them.
_MORE = re.compile(r"description_(\d+)")


def read_rows(path: Path, *, described: bool = True) -> Table:
    """Read a table of images and, if `described`, of their sentences.

    Returns:
        The table with its columns renamed: image and description (and description_2, ...); others as they are.

    Raises:
        ValueError: it cannot be read, or one of these columns is missing or there twice.
    """
    table = read_table(path)
    names = {"image": _column(table, IMAGE)} | ({"description": _column(table, DESCRIPTION)} if described else {})
    table.require(names.values())
    new = {old: key for key, old in names.items()}
    if text := names.get("description"):
        more = re.compile(rf"{text}[ _-]?(\d+)")
        new |= {column: f"description_{found[1]}" for column in table.columns if (found := more.fullmatch(column))}
    rows = [
        Row(
            {new.get(column, column): cell for column, cell in row.items()},
            row.number,
            {new.get(column, column): reason for column, reason in row.reasons.items()},
        )
        for row in table.rows
    ]
    return Table(table.path, [new.get(column, column) for column in table.columns], rows, table.faults)


def sentences(row: Row) -> list[str]:
    """Every different sentence of a row of `read_rows`, that of the column description first."""
    more = sorted((int(found[1]), cell) for column, cell in row.items() if (found := _MORE.fullmatch(column)))
    texts = [row["description"], *(cell for _, cell in more)]
    return list(dict.fromkeys(text for text in texts if is_sentence(text)))


def _column(table: Table, names: Sequence[str]) -> str:
    """The first of `names` that the table has; the first of all where it has none, to be required."""
    return next((name for name in names if name in table.columns), names[0])
