"""Numbers in place of the names of cases, subjects and files, for a report that is shown to others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
# Shorter names, and plain numbers, occur in sentences by chance.
_SHORTEST = 3


class HiddenNames:
    """The names of an evaluation's cases and what stands for them.

    Args:
        rows: of ``cases.csv``; ``case``, ``subject``, ``volume``, ``image`` and ``mask`` are hidden.
    """

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        self._cases = [row["case"] for row in rows]
        numbers: dict[str, str] = {}
        for kind in ("case", "subject", "volume", "image", "mask"):
            found = dict.fromkeys(row[kind] for row in rows if row.get(kind))
            for number, name in enumerate(found, 1):
                names = [name] if kind in ("case", "subject", "volume") else [name, Path(name).name, Path(name).stem]
                for text in names:
                    numbers.setdefault(text, f"{kind} {number:0{len(str(len(found)))}d}")
        self._numbers = numbers
        words = [n for n in numbers if len(n) >= _SHORTEST and not n.isdecimal()]
        words.sort(key=len, reverse=True)
        self._words = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)") if words else None

    def row(self, row: dict[str, str]) -> dict[str, str]:
        """A row of ``cases.csv`` as it is shown; the files keep their paths, from which they are read."""
        hidden: dict[str, str] = {
            key: self._numbers.get(row[key], "") for key in ("case", "subject", "volume") if key in row
        }
        texts: dict[str, str] = {key: self.text(row[key]) for key in ("text", "other_text") if row.get(key)}
        return {**row, **hidden, **texts}

    def text(self, text: str) -> str:
        """A text without the names in it."""
        return self._words.sub(lambda match: self._numbers[match[0]], text) if self._words else text

    def groups(self, labels: Sequence[str]) -> list[str]:
        """Labels of groups; those that are the ends of the cases' names are numbered, for a name may stand there."""
        if labels and all(case.endswith(tuple(f"_{label}" for label in labels if label)) for case in self._cases):
            return [f"group {number}" for number in range(1, len(labels) + 1)]
        return [self.text(label) for label in labels]


def hide_paths(config: str) -> str:
    """A configuration (YAML) without its files and folders."""
    import yaml

    return yaml.safe_dump(_without_paths(yaml.safe_load(config)), sort_keys=False, allow_unicode=True)


def _without_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, key) for item in value]
    is_path = isinstance(value, str) and (key == "path" or key.endswith("_dir") or "/" in value or "\\" in value)
    return HIDDEN if is_path else value
