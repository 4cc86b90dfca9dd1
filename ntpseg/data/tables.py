"""Reading and writing the tables that name images and sentences (Excel and CSV)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ntpseg.data.records import known_suffix
from ntpseg.data.workbooks import Cells, read_workbook
from ntpseg.utils.files import atomic_open, original_cell

MAX_BYTES = 2**28
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
# What programs write for a cell without a value, and Excel for a formula that failed.
_NO_TEXT = {"nan", "n/a", "na", "n.a.", "none", "null", "nil", "<na>", "nat", "true", "false"}
_NO_TEXT |= {"#n/a", "#ref!", "#name?", "#value!", "#div/0!", "#null!", "#num!"}


class Row(dict[str, str]):
    """A row of a table: stripped text by column name in lower case, "" for an empty cell.

    Attributes:
        number: of the row in its file as spreadsheet programs and editors count, the header being 1.
        reasons: by column, why its cell is empty, where something is known.
    """

    def __init__(self, cells: dict[str, str], number: int = 0, reasons: dict[str, str] | None = None) -> None:
        super().__init__(cells)
        self.number, self.reasons = number, reasons or {}

    def missing_text(self, column: str) -> str:
        """Why `column` holds no sentence: it is empty, a placeholder such as nan, or has no letter; "" if it does."""
        text = self[column]
        if not text:
            return f"its caption is empty{self.reasons.get(column, '')}"
        return "" if is_sentence(text) else f"its caption is {_short(text)!r}, not a sentence"


def is_sentence(text: str) -> bool:
    """Whether a text is more than blanks, a placeholder such as nan, or signs without a letter."""
    return text.strip().casefold() not in _NO_TEXT and any(letter.isalpha() for letter in text)


Rows = list[Row]


@dataclass(frozen=True)
class Table:
    """A table's content.

    Attributes:
        path: of its file.
        columns: the header in lower case.
        rows: the rows that hold any value.
        faults: what is wrong with other rows, as (number, what and how to mend it).
    """

    path: Path
    columns: list[str]
    rows: Rows = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)

    def require(self, columns: Iterable[str]) -> None:
        """Raise a `ValueError` unless the header has each of `columns` (lower case) once."""
        columns = tuple(columns)
        if missing := [name for name in columns if name not in self.columns]:
            found = _short(", ".join(self.columns))
            reason = f"must have the column {', '.join(missing)}, got {found} in its first row; name its columns there"
            raise ValueError(f"{self.path} {reason}") from ValueError(f"it {reason}")
        if twice := [name for name in columns if self.columns.count(name) > 1]:
            reason = f"must have the column {', '.join(twice)} once, got it twice; rename one"
            raise ValueError(f"{self.path} {reason}") from ValueError(f"it {reason}")

    def refuse_faults(self) -> None:
        """Raise a `ValueError` that names the rows with a fault, if there are any."""
        if self.faults:
            shown = "; ".join(f"row {number} {reason}" for number, reason in self.faults[:3])
            more = f"; and {len(self.faults) - 3} more rows" if len(self.faults) > 3 else ""
            raise ValueError(f"{self.path} must be a table with all its rows in order, but {shown}{more}")


def read_table(path: Path) -> Table:
    """Read a table.

    The first sheet of an Excel file (.xlsx), or a text file whose columns end at commas, semicolons, tabs or bars, in
    UTF-8 or in UTF-16 with a byte-order mark. The content decides, not the name. Rows without any value are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no such table; the message names it, the row where there is one, and the cure.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} must be a table, got no file of that name")
    try:
        return _read_table(path)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be a readable table, got {reason}") from ValueError(reason)


def read_columns(path: Path, columns: Sequence[str]) -> Table:
    """`read_table`, and ValueError where the table does not have each of `columns` (lower case) once."""
    table = read_table(path)
    table.require(columns)
    return table


def write_excel(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write one sheet of text cells (no text becomes a formula); the file appears complete or not at all."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in (header, *rows):
        cells = [WriteOnlyCell(sheet, value) for value in row]
        for cell in cells:
            cell.data_type = "s"
        sheet.append(cells)
    with atomic_open(path) as file:
        book.save(file)


def _read_table(path: Path) -> Table:
    if not path.is_file():
        raise ValueError("a folder or a device instead of a file")
    size = path.stat().st_size
    if size == 0:
        raise ValueError("an empty file (0 bytes); copy it again")
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes, more than {MAX_BYTES:,}; split it")
    content = path.read_bytes()
    if content[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        raise ValueError("an old Excel file (.xls) or one with a password; save it as .xlsx without a password")
    if content[:4] == b"PK\x03\x04":
        return _table(path, read_workbook(content))
    if path.suffix.lower() in (".xlsx", ".xlsm") and (content[:2] == b"PK" or b"\0" in content[:512]):
        raise ValueError("a damaged Excel file; copy it again")
    text = _decode(content)
    if text.lstrip()[:1] == "<":
        raise ValueError("a web page or XML: a download that failed? download it again, or save it as .xlsx or CSV")
    if text.startswith("version https://git-lfs"):
        raise ValueError("a Git LFS pointer instead of the file; run git lfs pull")
    if path.suffix.lower() == ".xls":
        raise ValueError("text under the name of an old Excel file (.xls), which is not read; name it .csv")
    return _table(path, _read_text(text))


def _decode(content: bytes) -> str:
    cure = "save the table as UTF-8 (Excel: CSV UTF-8)"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            text = content.decode("utf-16")
        except UnicodeDecodeError:
            raise ValueError(f"damaged UTF-16; {cure}") from None
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            row = content.count(b"\n", 0, error.start) + 1
            raise ValueError(f"row {row} in another encoding than UTF-8 (GBK, Latin-1 ...); {cure}") from None
    if (place := text.find("\0")) >= 0:
        raise ValueError(f"NUL bytes in row {text.count(chr(10), 0, place) + 1}, of UTF-16 or of damage; {cure}")
    return text


def _read_text(text: str) -> Cells:
    """Split a text into cells."""
    lines = io.StringIO(text, newline="")
    first = next((line for line in lines if line.strip()), "").strip("\r\n")
    skipped = 0
    if declared := re.fullmatch(r'"?sep=([,;|\t])"?', first):
        # Excel's own line above the header.
        separator, skipped = declared.group(1), 1
    else:
        separator = max(SEPARATORS, key=first.count)
    # newline="": a line break inside quotes stays as it is, and one of any system ends a row.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    cells, number = Cells(separator=SEPARATORS[separator]), 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return cells
        except csv.Error as error:
            raise ValueError(
                f"a quote that is not closed, or text beside quotes, in row {number} ({error}); put the whole "
                'sentence into double quotes and write "" for a quote inside'
            ) from None
        for cell in row:
            if any(known_suffix(line.split(separator)[0].strip()) for line in cell.splitlines()[1:]):
                raise ValueError(f"a quote in row {number} that is not closed there; close it")
        if number > skipped:
            cells.rows.append((number, list(row)))
        number = reader.line_num + 1


def _table(path: Path, cells: Cells) -> Table:
    filled = [(number, row) for number, row in cells.rows if any(_text(cell) for cell in row)]
    if not filled:
        raise ValueError("no row")
    header = [_text(cell).lower() for cell in filled[0][1]]
    while not header[-1]:
        header.pop()
    table = Table(path, header)
    for number, row in filled[1:]:
        values = [_text(cell) for cell in row]
        if fault := _fault(header, row, values, cells.separator):
            table.faults.append((number, fault))
            continue
        # Of columns with one name the first counts; `Table.require` refuses the ones that matter.
        named = dict(reversed([pair for pair in zip_longest(header, values[: len(header)], fillvalue="") if pair[0]]))
        reasons = {header[i]: why for i, why in cells.reasons.get(number, {}).items() if i < len(header)}
        table.rows.append(Row(named, number, reasons))
    return table


def _fault(header: list[str], row: list[Any], values: list[str], separator: str) -> str:
    if [value.lower() for value in values[: len(header)]] == header:
        return "repeats the header; delete it"
    filled = max((i for i, value in enumerate(values, start=1) if value), default=0)
    if filled > len(header):
        cure = f"put a sentence with a {separator} in it into double quotes" if separator else "name every column"
        return f"has {len(row) if separator else filled} fields, the header {len(header)}; {cure}"
    if separator and len(row) < len(header):
        return f"has {len(row)} field{'s' if len(row) > 1 else ''}, the header {len(header)}; fill it up"
    return ""


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return original_cell(str(cell).strip()).strip()


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
