"""Reading and writing the tables that name images and sentences (Excel and CSV)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ntpseg.utils.files import atomic_open

Rows = list[dict[str, str]]


def read_table(path: Path) -> Rows:
    """Read the first sheet of an .xlsx file, or a .csv or .tsv file (UTF-8, with or without a byte-order mark).

    Returns:
        One dictionary a row; keys are the header in lower case, values are stripped text ("" for an empty cell).
        Rows without any value are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no such table; the message names it.
    """
    import pandas

    try:
        if path.suffix.lower() in (".xlsx", ".xls"):
            frame = pandas.read_excel(path, dtype=str, keep_default_na=False, na_values=[])
        else:
            separator = "\t" if path.suffix.lower() == ".tsv" else ","
            frame = pandas.read_csv(path, dtype=str, keep_default_na=False, sep=separator, encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except Exception as error:  # pandas and openpyxl raise many kinds for a file that is not a table
        raise ValueError(f"{path} must be a readable table, got: {error}") from error
    frame.columns = [str(name).strip().lower() for name in frame.columns]
    rows = [{str(k): str(v).strip() for k, v in row.items()} for row in frame.fillna("").to_dict("records")]
    return [row for row in rows if any(row.values())]


def read_columns(path: Path, columns: Sequence[str]) -> Rows:
    """`read_table`, and ValueError where a row does not have one of `columns` (lower case)."""
    rows = read_table(path)
    if rows and (missing := [name for name in columns if name not in rows[0]]):
        raise ValueError(f"{path} must have the column {', '.join(missing)}, got {', '.join(rows[0])}")
    return rows


def write_excel(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write one sheet; the file appears complete or not at all."""
    from openpyxl import Workbook

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(list(header))
    for row in rows:
        sheet.append(list(row))
    with atomic_open(path) as file:
        book.save(file)
