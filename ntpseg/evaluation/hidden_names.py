"""Names of cases, subjects and files taken out of what a report shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Shorter names ("1", "ct") are words of the report itself; where a case is named they are replaced all the same.
_SHORTEST = 4


def without_names(shown: Any, rows: Sequence[dict[str, str]], also: Sequence[str] = ()) -> Any:
    """A copy of what a template is given, with numbers instead of names; pictures hold none.

    Args:
        shown: nested dicts, lists and tuples; strings in them are replaced, the value under "case" as a whole.
        rows: of ``cases.csv``; the n-th one's names become "case n", its subject "subject n" in the order of rows.
        also: other names, such as the data set's folder; they become "hidden".
    """
    labels: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        labels.setdefault(row["case"], f"case {number}")
        for key in ("image", "mask", "volume"):
            if row.get(key):
                path = Path(row[key])
                for name in (str(path), path.name, path.name.split(".")[0]):
                    labels.setdefault(name, labels[row["case"]])
    subjects = dict.fromkeys(row["subject"] for row in rows if row.get("subject"))
    for number, subject in enumerate(subjects, 1):
        labels.setdefault(subject, f"subject {number}")
    for name in also:
        labels.setdefault(name, "hidden")
    names = sorted((name for name in labels if len(name) >= _SHORTEST), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)) or "(?!)", re.IGNORECASE)
    lowered = {name.lower(): label for name, label in labels.items()}

    def clean(value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            if key == "case" and value in labels:
                return labels[value]
            return value if value.startswith("data:") else pattern.sub(lambda found: lowered[found[0].lower()], value)
        if isinstance(value, dict):
            return {clean(name): clean(entry, str(name)) for name, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(clean(entry) for entry in value)
        return value

    return clean(shown)
