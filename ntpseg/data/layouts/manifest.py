"""A plain table of pairs: columns image, mask, text, and if wanted split, subject and case."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

from ntpseg.data import problems
from ntpseg.data.layouts.base import Layout, Listing
from ntpseg.data.layouts.folders import normalise_name
from ntpseg.data.records import SPLITS, Record, case_of, known_suffix, subject_of
from ntpseg.data.tables import Rows, read_table

# Other names of a column that are in use.
ALIASES = {
    "image": ("image", "image_path", "img", "img_path", "filename"),
    "mask": ("mask", "mask_path", "label", "label_path", "gt"),
    "text": ("text", "description", "caption", "sentence", "prompt"),
    "split": ("split", "set", "fold"),
    "subject": ("subject", "subject_id", "patient", "patient_id"),
    "case": ("case", "case_id", "id"),
}
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NAMES = ("manifest.csv", "manifest.tsv", "manifest.xlsx")
TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx")
# Fractions of the subjects in train, val and test where the table has no split column.
SPLIT_FRACTIONS = (0.70, 0.15, 0.15)


def find_manifest(path: Path) -> Path | None:
    """The table that `path` means: itself, ``manifest.csv`` in it, or the only table in it that has all columns."""
    if path.is_file():
        return path if path.suffix.lower() in TABLE_SUFFIXES else None
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    tables = [entry for entry in sorted(path.iterdir()) if entry.suffix.lower() in TABLE_SUFFIXES and entry.is_file()]
    return tables[0] if len(tables) == 1 else None


def read_manifest(path: Path) -> Listing:
    """List the pairs of a manifest; opens the table, but no image.

    Paths in it are absolute or relative to the table's folder. Rows of one image share a subject. Without a split
    column the subjects, in an order that depends on their names alone, go to train, val and test by `SPLIT_FRACTIONS`.

    Args:
        path: the table, or the folder that holds it.

    Raises:
        ValueError: there is no table, it is unreadable, or one of the columns image, mask and text is missing.
    """
    table = find_manifest(path)
    if table is None:
        raise ValueError(f"path must be a manifest (CSV), or a folder with manifest.csv in it, got {path}")
    listing = Listing(table.parent)
    rows = _rename(table, read_table(table))
    keys = [(row["image"], row["mask"], row["text"]) for row in rows]
    distinct = {key: row for key, row in reversed(list(zip(keys, rows)))}
    cases = dict(zip(distinct, _cases(list(distinct.values()))))
    subjects = [row.get("subject") or _subject(row["image"]) for row in rows]
    assigned = None if rows and "split" in rows[0] else split_subjects(subjects)
    seen: dict[tuple[str, str, str], int] = {}
    listed: dict[Path, dict[str, Path]] = {}
    for number, (row, key, subject) in enumerate(zip(rows, keys, subjects), start=2):
        split = assigned[subject] if assigned is not None else SPLIT_NAMES.get(row["split"].lower(), "")
        name = f"{table.name}:{number} {row['image'] or row['mask']}"
        image, mask = (_resolve(table.parent, row[kind], listed) for kind in ("image", "mask"))
        if not split:
            listing.report(
                problems.NO_SPLIT, "", name, f"split must be one of {', '.join(SPLITS)}, got {row['split']!r}"
            )
        elif key in seen:
            listing.report(problems.DUPLICATE, split, name, f"the same as row {seen[key]}, which counts")
        elif image is None:
            listing.report(problems.MISSING_IMAGE, split, name, "there is no such image")
        elif not row["text"]:
            listing.report(problems.MISSING_TEXT, split, name, "its text is empty")
        elif mask is None:
            reason = f"there is no {row['mask']}" if row["mask"] else "its mask is empty"
            listing.report(problems.MISSING_MASK, split, name, reason)
        else:
            listing.records.append(Record(image, mask, row["text"], split, cases[key], subject))
        seen.setdefault(key, number)
    listing.records.sort(key=lambda record: SPLITS.index(record.split))
    return listing


def split_subjects(subjects: list[str]) -> dict[str, str]:
    """Assign subjects to splits by `SPLIT_FRACTIONS`, by their names alone; three subjects fill all three splits."""
    order = sorted(set(subjects), key=lambda subject: (hashlib.sha256(subject.encode()).digest(), subject))
    held = [max(round(fraction * len(order)), 1) if len(order) > 2 else 0 for fraction in SPLIT_FRACTIONS[1:]]
    starts = (len(order) - sum(held), len(order) - held[1])
    return {
        subject: "train" if place < starts[0] else "val" if place < starts[1] else "test"
        for place, subject in enumerate(order)
    }


def _rename(table: Path, rows: Rows) -> Rows:
    if not rows:
        raise ValueError(f"manifest {table} must have at least one row, got none")
    names = {key: next((alias for alias in aliases if alias in rows[0]), None) for key, aliases in ALIASES.items()}
    if missing := [key for key in ("image", "mask", "text") if names[key] is None]:
        raise ValueError(f"manifest {table} must have the column {', '.join(missing)}, got {', '.join(rows[0])}")
    return [{key: row[name] for key, name in names.items() if name is not None} for row in rows]


def _resolve(folder: Path, name: str, listed: dict[Path, dict[str, Path]]) -> Path | None:
    """The file of that name, in whichever Unicode form it is stored; `listed` caches the folders already read."""
    if not name:
        return None
    path = folder / Path(name.replace("\\", "/")).expanduser()
    if path.is_file():
        return path
    if path.parent not in listed:
        entries = path.parent.iterdir() if path.parent.is_dir() else ()
        listed[path.parent] = {normalise_name(entry.name): entry for entry in entries}
    return listed[path.parent].get(normalise_name(path.name))


def _file_name(path: str) -> str:
    return re.split(r"[\\/]", path)[-1]


def _stem(name: str) -> str:
    """A path without extension, in one word."""
    name = name[: -len(suffix)] if (suffix := known_suffix(name)) else name
    return re.sub(r"[\\/]+", "__", name.lstrip("./\\"))


def _subject(image: str) -> str:
    case = case_of(_file_name(image))
    return subject if (subject := subject_of(case)) != case else _stem(image)


def _cases(rows: Rows) -> list[str]:
    """A name for every row: its own, else the image's, made longer only where two rows would share it."""
    choices = [
        (
            row.get("case") or case_of(_file_name(row["image"])),
            _stem(row["image"]),
            f"{_stem(row['image'])}__{case_of(_file_name(row['mask']))}",
            f"{_stem(row['image'])}__{case_of(_file_name(row['mask']))}__{hashlib.sha256(row['text'].encode()).hexdigest()[:6]}",
        )
        for row in rows
    ]
    level = [0] * len(rows)
    while True:
        names = [choice[depth] for choice, depth in zip(choices, level)]
        counts = Counter(names)
        shared = [i for i, name in enumerate(names) if counts[name] > 1 and level[i] < len(choices[i]) - 1]
        if not shared:
            return names
        for i in shared:
            level[i] += 1


MANIFEST = Layout(
    "manifest",
    lambda path: find_manifest(path) is not None,
    read_manifest,
    "a CSV file with the columns image, mask, text",
)
