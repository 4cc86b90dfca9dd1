"""The cells of an Excel file's first sheet, read in a stream and within limits."""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass, field
from typing import Any

MAX_UNPACKED = 2**27
# Columns after these are not looked at: sheets with a stray cell at the far right claim 16,384 of them.
MAX_COLUMNS = 64
# Columns beside the header's that are looked at, to find rows with too many fields.
_BEYOND = 4
_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s[^>]*?ref="([A-Z]+)(\d+):([A-Z]+)(\d+)"')


@dataclass
class Cells:
    """Cells as they were read.

    Attributes:
        rows: number of the row in its file, and its cells.
        reasons: why a cell is empty, by the number of its row and its place in it.
        separator: name of the sign between columns; "" for a workbook.
    """

    rows: list[tuple[int, list[Any]]] = field(default_factory=list)
    reasons: dict[int, dict[int, str]] = field(default_factory=dict)
    separator: str = ""


def read_workbook(content: bytes) -> Cells:
    """The non-empty rows of the first sheet of an .xlsx file; a formula's value is the one that was saved with it.

    Raises:
        ValueError: it is none, or it unpacks to more than `MAX_UNPACKED` bytes.
    """
    try:
        return _read_workbook(content)
    except ValueError:
        raise
    except MemoryError:
        raise ValueError("a workbook that does not fit into memory; save it as CSV") from None
    except Exception as error:  # zipfile, openpyxl and its XML parser raise many kinds for a damaged file
        raise ValueError(f"a damaged Excel file, or another kind of file ({_reason(error)}); save it again") from error


def _read_workbook(content: bytes) -> Cells:
    from openpyxl import load_workbook
    from openpyxl.utils import column_index_from_string

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        # zipfile unpacks no more of a member than the directory says.
        if (unpacked := sum(member.file_size for member in archive.infolist())) > MAX_UNPACKED:
            raise ValueError(f"{unpacked:,} bytes when unpacked, more than {MAX_UNPACKED:,}; save the table as CSV")
        if "[Content_Types].xml" not in names:
            raise ValueError("a zip archive that is no Excel file (.ods?); save it as .xlsx or CSV")
        book = load_workbook(io.BytesIO(content), read_only=True, data_only=False)
        if not book.worksheets:
            raise ValueError("a workbook without a sheet")
        sheet = book.worksheets[0]
        merged = archive.read(str(sheet._worksheet_path).lstrip("/"))
    cells = Cells()
    formulas: dict[int, list[int]] = {}
    # The size that a sheet claims may be wrong in either direction.
    sheet.reset_dimensions()
    # The header says how wide the table is: sheets of a million formatted rows are read in seconds then.
    rows = sheet.iter_rows(max_col=MAX_COLUMNS, values_only=True)
    filled = ([i for i, value in enumerate(row, start=1) if str(value or "").strip()] for row in rows)
    width = max(next((places for places in filled if places), [0]))
    width = min(width + _BEYOND, MAX_COLUMNS)
    empty: Any = None
    for number, row in enumerate(sheet.iter_rows(max_col=width), start=1):
        if row is empty:
            continue  # one tuple stands for all rows that the file leaves out
        values = [cell.value for cell in row]
        if any(value is not None for value in values):
            cells.rows.append((number, values))
            if places := [i for i, cell in enumerate(row) if cell.data_type == "f"]:
                formulas[number] = places
        else:
            empty = row
    if formulas:
        _insert_values(cells, formulas, content)
    numbers = {number for number, _ in cells.rows}
    for left, top, right, bottom in _MERGED.findall(merged):
        first, last = (min(column_index_from_string(name.decode()), MAX_COLUMNS) for name in (left, right))
        for number in numbers.intersection(range(int(top) + 1, int(bottom) + 1)):
            for place in range(first - 1, last):
                where = f"{left.decode()}{top.decode()}"
                cells.reasons.setdefault(number, {})[place] = f", merged with {where}: unmerge, and repeat the text"
    return cells


def _insert_values(cells: Cells, formulas: dict[int, list[int]], content: bytes) -> None:
    """Replace formulas by the values that the spreadsheet program saved with them."""
    from openpyxl import load_workbook

    sheet = load_workbook(io.BytesIO(content), read_only=True, data_only=True).worksheets[0]
    sheet.reset_dimensions()
    wanted = dict(cells.rows)
    for number, row in enumerate(sheet.iter_rows(max_col=MAX_COLUMNS, values_only=True), start=1):
        for place in formulas.get(number, ()):
            value = wanted[number][place] = row[place] if place < len(row) else None
            if value is None:
                reason = ", a formula without a saved value: paste it as a value"
                cells.reasons.setdefault(number, {})[place] = reason


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
