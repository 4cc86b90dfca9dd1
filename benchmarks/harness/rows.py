"""Rows of results in JSON files, each file whole or absent.

A row is a flat dict. Its key ``contestant`` is the provider's name and ``does`` what that computes: the names of the
first result files, kept so that old and new rows can be read together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
Row = dict[str, Any]


def write(path: Path, rows: Iterable[Row]) -> None:
    """One row a line between the brackets of a JSON list."""
    # with --base, workers import this beside a revision of the package that may lack the module; they never write
    from ntpseg.utils.files import write_text

    lines = ",\n".join(json.dumps(rounded(row)) for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


def read(folder: Path) -> list[Row]:
    """The rows of all result files of this suite in a folder; files of other makers there are passed over."""
    return [row for path in sorted(folder.glob("*.json")) for row in read_file(path)]


def read_file(path: Path) -> list[Row]:
    """The rows of one file; none where another maker wrote it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, list):
        return []
    return [row for row in content if isinstance(row, dict) and "benchmark" in row and "contestant" in row]


def rounded(value: Any) -> Any:
    """Floats to five digits, in whatever is nested."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
