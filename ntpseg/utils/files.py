"""Atomic writes: a file or folder appears complete under its name, and survives a crash, or is not there at all.

Everything is written under a temporary name in the same folder, flushed to the disk (``fsync`` of the file or of the
whole tree), renamed, and the rename is flushed too (``fsync`` of the containing folder).
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TEMPORARY_FOLDER = ".building-"
_STALE_SECONDS = 24 * 3600


@contextmanager
def atomic_open(path: str | Path) -> Iterator[IO[bytes]]:
    """Open `path` for binary writing; it is replaced when the block ends, and left as it was when the block raises.

    The folder is created if absent. The new file has the permissions that the umask gives.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's, which only their owner can read: asking for the umask sets it, for all threads.
    temporary = path.with_name(f".{_shortened(path.name)}.{secrets.token_hex(6)}.tmp")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the operating system that name no file (a full disk while writing) this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, see `atomic_open`."""
    with atomic_open(path) as file:
        file.write(data)


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Create the folder `path` from what the block writes into the folder that it yields.

    Args:
        path: the folder to create; its parents are created if absent.
        replace: an existing `path` is removed. If False, only an empty one is.

    Raises:
        FileExistsError: `replace` is False and, at the end of the block, `path` exists and is not empty.
    """
    # Beside the folder itself, where `path` is a link to it or has no name (".").
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_FOLDER}{_shortened(path.name)}.{secrets.token_hex(6)}")
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, path, replace=replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(source: Path, path: Path, *, replace: bool = True) -> None:
    """Flush the complete folder `source` and rename it to `path`; arguments and errors as in `atomic_folder`."""
    for root, _, names in os.walk(source):
        for name in names:
            fsync_path(Path(root, name))
        fsync_path(Path(root))
    if replace:
        remove_folder(path)
    try:
        os.rename(source, path)
    except OSError as error:
        if path.is_dir() and any(path.iterdir()):
            raise FileExistsError(f"{path} must be a new or an empty folder, got one with content") from error
        raise
    fsync_path(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder or file, if it is there, so that nothing meets it half empty: renamed first, then deleted."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY_FOLDER) as trash, suppress(FileNotFoundError):
        os.rename(path, Path(trash, path.name))


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def remove_stale_folders(directory: Path) -> None:
    """Remove what a killed `atomic_folder` left in `directory` more than a day ago.

    Whoever writes for longer into files that are there touches the folder (`os.utime`) from time to time.
    """
    for path in directory.glob(f"{TEMPORARY_FOLDER}*"):
        try:
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)


def is_litter(path: Path) -> bool:
    """Whether the name is that of a file or folder which a killed write of this module left."""
    return path.name.startswith(TEMPORARY_FOLDER) or (path.name.startswith(".") and path.suffix == ".tmp")


def remove_litter(directory: Path) -> None:
    """Remove what killed writes left in `directory`, into which nothing but this process may write."""
    for path in filter(is_litter, list(directory.iterdir())):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8."""
    atomic_write(path, text.encode("utf-8"))


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, see `json_text`."""
    write_text(path, json_text(value, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line, see `json_text`."""
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file with one per line; [] without the file. A line cut off by a killed process is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write_csv(path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a comma-separated table with a header line.

    A text that a spreadsheet program would take for a formula gets an apostrophe in front, see `safe_cell`; `read_csv`
    takes it away again.
    """
    buffer = io.StringIO(newline="")
    # A lone carriage return ends a row for readers, but the writer quotes only what its own rows end with.
    plain, quoted = (csv.writer(buffer, lineterminator="\n", quoting=q) for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    for row in (columns, *rows):
        cells = [safe_cell(cell) for cell in row]
        (quoted if any("\r" in cell for cell in cells if isinstance(cell, str)) else plain).writerow(cells)
    write_text(path, buffer.getvalue())


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a table of `write_csv`, by column name."""
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        return [{original_cell(k): original_cell(v) for k, v in row.items()} for row in csv.DictReader(file)]


# What spreadsheet programs take for the beginning of a formula, perhaps after apostrophes of `safe_cell`.
_FORMULA = re.compile(r"'*\s*[=+\-@\t\r＝＋－＠]")  # noqa: RUF001 - full-width signs count too


def safe_cell(cell: Any) -> Any:
    """`cell` as spreadsheet programs show it without computing anything (CWE-1236).

    A text that begins with ``=``, ``+``, ``-``, ``@``, tab or carriage return gets an apostrophe in front, unless it is
    a number; anything but a text or a path is left alone.
    """
    if not isinstance(cell, (str, os.PathLike)):
        return cell
    text = str(cell)
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def original_cell(text: Any) -> Any:
    """The inverse of `safe_cell`."""
    if isinstance(text, str) and text.startswith("'") and _FORMULA.match(text[1:]) and not _is_number(text[1:]):
        return text[1:]
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    # float() takes a line break beside a number, a spreadsheet program may not.
    return text == text.strip()


def _shortened(name: str) -> str:
    """The beginning of a name that may itself be as long as names can be (255 bytes)."""
    return os.fsencode(name)[:200].decode("utf-8", "ignore")


def file_identity(path: Path) -> tuple[int, int] | None:
    """Device and inode, which all names of a file share; None where nothing is there or the file system has none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino) if stat.st_ino else None


def printable(name: str) -> str:
    """A file name as UTF-8 can hold it: bytes of another encoding as ``\\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
