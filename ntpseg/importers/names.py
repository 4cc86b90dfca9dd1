"""Names of labels: JSON, YAML, CSV, ITK-SNAP's label descriptions and FreeSurfer's colour tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ntpseg.importers.base import Structure
from ntpseg.importers.templates import read_mapping
from ntpseg.utils.checks import brief

_BACKGROUND = ("background", "clear label", "unknown", "ignore")
_VALUE_COLUMNS = ("value", "id", "index", "label_value", "labelvalue", "label_id", "labelid", "intensity", "label")
_NAME_COLUMNS = ("name", "structure", "label_name", "labelname", "class", "class_name", "organ_name", "label", "organ")
_COLUMNS_WITHOUT_MEANING = ("r", "g", "b", "a", "red", "green", "blue", "alpha", "color", "colour", "opacity")
# IDX R G B A VIS MSH "LABEL"
_SNAP = re.compile(r'\s*(\d+)(?:\s+[\d.]+){6}\s+"(.*)"\s*')
# No. Name R G B A
_FREESURFER = re.compile(r"\s*(\d+)\s+(\S+)(?:\s+\d+){4}\s*")


@dataclass(frozen=True, slots=True)
class Names:
    """What a source calls the values of its label maps.

    Attributes:
        structures: what may be asked for.
        ignored: values of the background and of what is to be ignored.
    """

    structures: tuple[Structure, ...]
    ignored: frozenset[int] = frozenset()


def read_names(path: Path | None, option: str = "--names") -> Names:
    """The names in a file.

    JSON and YAML map values to names or names to values (or lists of values: a union), directly or under "labels", or
    list the names from 0. CSV and TSV have a column with the value (value, id, index, ...) and one with the name (name,
    structure, ...); their other columns are fields for templates.

    Raises:
        ValueError: there is no file, or none of these is in it; the message names it.
    """
    if path is None:
        raise ValueError(f"{option} must be a file with the labels' names, got none (JSON, YAML, CSV or ITK-SNAP)")
    if not path.is_file():
        raise ValueError(
            f"{option} must be a file, got {path}, which {'is a folder' if path.exists() else 'is missing'}"
        )
    suffix = path.suffix.lower()
    if suffix == ".json" and (listed := _json_list(path)) is not None:
        names = names_of(dict(enumerate(listed)), str(path))
    elif suffix in (".json", ".yaml", ".yml"):
        content = read_mapping(path, option)
        names = names_of(content.get("labels", content), str(path))
    elif suffix in (".csv", ".tsv", ".xlsx"):
        names = _from_table(path)
    else:
        names = _from_lines(path)
    if not names.structures:
        raise ValueError(f"{option} must name at least one label, got none in {path}")
    return names


def names_of(content: Any, where: str) -> Names:
    """The names in a mapping of values to names, or of names to one value or several."""
    if not isinstance(content, Mapping):
        raise ValueError(f"labels of {where} must map values to names, or names to values, got {brief(content)}")
    pairs: list[tuple[str, tuple[int, ...]]] = []
    for key, entry in content.items():
        # Values as keys: nnU-Net 1, the Medical Segmentation Decathlon, MONAI. Names as keys: nnU-Net 2.
        name, values = (entry, key) if _is_number(key) and isinstance(entry, str) else (key, entry)
        several = values if isinstance(values, list | tuple) else [values]
        if not isinstance(name, str) or not several or not all(_is_number(value) for value in several):
            raise ValueError(f"labels of {where} must map values to names, got {brief(key)}: {brief(entry)}")
        pairs.append((name.strip(), tuple(int(value) for value in several)))
    return _named(pairs, where)


def _named(pairs: Iterable[tuple[str, tuple[int, ...]]], where: str) -> Names:
    found: dict[str, Structure] = {}
    ignored: set[int] = set()
    for name, values in pairs:
        if name.lower() in _BACKGROUND or values == (0,) or not name:
            ignored.update(values)
            continue
        if name in found:
            raise ValueError(f"labels of {where} must have names of their own, got {name!r} twice")
        found[name] = Structure(name, tuple((0, value) for value in values if value))
    return Names(tuple(found.values()), frozenset(ignored))


def _json_list(path: Path) -> list[Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None
    return content if isinstance(content, list) and all(isinstance(name, str) for name in content) else None


def _from_table(path: Path) -> Names:
    from ntpseg.data.tables import read_table

    table = read_table(path)
    rows = table.rows
    value = next((c for c in _VALUE_COLUMNS if c in table.columns and all(_is_number(row[c]) for row in rows)), None)
    name = next((c for c in _NAME_COLUMNS if c in table.columns and c != value), None)
    if value is None or name is None:
        raise ValueError(
            f"{path} must have a column with the labels' values (such as value) and one with their names (such as "
            f"name), got {', '.join(table.columns)}"
        )
    others = [c for c in table.columns if c.isidentifier() and c not in (value, name, *_COLUMNS_WITHOUT_MEANING)]
    plain = _named(((row[name], (int(float(row[value])),)) for row in rows), str(path))
    by_name = {row[name]: row for row in rows}
    structures = (
        replace(one, fields=tuple((c, by_name[one.name].get(c, "")) for c in others)) for one in plain.structures
    )
    return replace(plain, structures=tuple(structures))


def _from_lines(path: Path) -> Names:
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8, got another encoding") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _SNAP.fullmatch(line) or _FREESURFER.fullmatch(line)
        if match is None:
            raise ValueError(
                f'{path} must have lines such as 1 255 0 0 1 1 1 "liver" (ITK-SNAP) or 1 liver 255 0 0 0 (FreeSurfer), '
                f"got {brief(line)} in line {number}"
            )
        pairs.append((match[2].strip(), (int(match[1]),)))
    return _named(pairs, str(path))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return float(value).is_integer()
    except (TypeError, ValueError):
        return False
