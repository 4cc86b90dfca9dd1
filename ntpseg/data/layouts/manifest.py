"""A plain table of pairs: columns image, mask, text, and if wanted split, subject, case and where slices lie."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

from ntpseg.data import problems
from ntpseg.data.layouts.base import Layout, Listing
from ntpseg.data.layouts.folders import FolderNames, no_file
from ntpseg.data.layouts.pairing import mask_value_fault, report_faults
from ntpseg.data.layouts.slices import PLACE_COLUMNS, VolumeRows, read_place
from ntpseg.data.records import PATIENT_FOLDER, SPLITS, Record, SlicePlace, case_of, known_suffix, subject_of
from ntpseg.data.tables import Row, Rows, Table, read_table

# Other names of a column that are in use.
ALIASES = {
    "image": ("image", "image_path", "img", "img_path", "filename"),
    "mask": ("mask", "mask_path", "label", "label_path", "gt"),
    "text": ("text", "description", "caption", "sentence", "prompt"),
    "split": ("split", "set", "fold"),
    "subject": ("subject", "subject_id", "patient", "patient_id"),
    "case": ("case", "case_id", "id"),
    "mask_value": ("mask_value",),
    **{name: (name,) for name in PLACE_COLUMNS},
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

    Paths in it are absolute or relative to the table's folder. Rows of one image, or of one volume, share a subject.
    Without a split column the subjects, in an order that depends on their names alone, go to train, val and test by
    `SPLIT_FRACTIONS`. The columns `PLACE_COLUMNS` become `Record.place`.

    Args:
        path: the table, or the folder that holds it.

    Raises:
        ValueError: there is no table, it is unreadable, or one of the columns image, mask and text is missing.
    """
    table = find_manifest(path)
    if table is None:
        raise ValueError(f"path must be a manifest (CSV), or a folder with manifest.csv in it, got {path}")
    listing = Listing(table.parent)
    content = read_table(table)
    rows = _rename(content)
    report_faults("", content, listing)
    keys = [(row["image"], row["mask"], row["text"], row.get("mask_value", "")) for row in rows]
    distinct = {key: row for key, row in reversed(list(zip(keys, rows)))}
    cases = dict(zip(distinct, _cases(list(distinct.values()))))
    subjects = [row.get("subject") or _subject(row["image"], row.get("volume", "")) for row in rows]
    listing.patients.update(subject for row, subject in zip(rows, subjects) if row.get("subject") or row.get("volume"))
    assigned = None if rows and "split" in rows[0] else split_subjects(subjects)
    seen: dict[tuple[str, ...], int] = {}
    files, volumes = _Files(table.parent), VolumeRows()
    for row, key, subject in zip(rows, keys, subjects):
        split = assigned[subject] if assigned is not None else SPLIT_NAMES.get(row["split"].lower(), "")
        name = f"{table.name}:{row.number} {row['image'] or row['mask']}"
        image, mask = (files.find(row[kind]) for kind in ("image", "mask"))
        value = row.get("mask_value", "")
        if not split:
            listing.report(
                problems.NO_SPLIT, "", name, f"split must be one of {', '.join(SPLITS)}, got {row['split']!r}"
            )
        elif key in seen:
            listing.report(problems.DUPLICATE, split, name, f"the same as row {seen[key]}, which counts")
        elif image is None:
            listing.report(problems.MISSING_IMAGE, split, name, f"there is no such image{files.hint(row['image'])}")
        elif reason := row.missing_text("text"):
            listing.report(problems.MISSING_TEXT, split, name, reason.replace("its caption", "its text"))
        elif mask is None:
            reason = f"there is no {row['mask']}{files.hint(row['mask'])}" if row["mask"] else "its mask is empty"
            listing.report(problems.MISSING_MASK, split, name, reason)
        elif mask == image:
            listing.report(problems.MISSING_MASK, split, name, "its mask is the image itself")
        elif reason := mask_value_fault(value):
            listing.report(problems.BAD_ROW, split, name, reason)
        else:
            place, kind, reason = _place(row, volumes, subject)
            if reason:
                listing.report(kind, split, name, reason)
            else:
                listing.records.append(Record(image, mask, row["text"], split, cases[key], subject, value, place))
        seen.setdefault(key, row.number)
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


def _rename(table: Table) -> Rows:
    if not table.rows and not table.faults:
        raise ValueError(f"manifest {table.path} must have at least one row, got none")
    names = {key: next((a for a in aliases if a in table.columns), None) for key, aliases in ALIASES.items()}
    table.require([names[key] or key for key in ("image", "mask", "text")])
    table.require([name for name in names.values() if name is not None])
    return [
        Row(
            {key: row[name] for key, name in names.items() if name is not None},
            row.number,
            {key: row.reasons[name] for key, name in names.items() if name in row.reasons},
        )
        for row in table.rows
    ]


class _Files:
    """The files that a manifest's paths name.

    Args:
        root: folder that paths are relative to.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listed: dict[Path, FolderNames] = {}

    def find(self, name: str) -> Path | None:
        """The file `name`, in whichever Unicode form it is stored; else the only one that it can mean."""
        if not name:
            return None
        try:
            path = self._root / Path(name.replace("\\", "/")).expanduser()
            if path.is_file():
                return path
            if path.parent not in self._listed:
                self._listed[path.parent] = FolderNames(path.parent)
        except (OSError, ValueError, RuntimeError):  # too long, or no such user in ~user
            return None
        found = self._listed[path.parent](path.name)
        return found if found is not None and found.is_file() else None

    def hint(self, name: str) -> str:
        """Where a file of this name is, for a message; "" where there is none below the manifest."""
        if what := no_file(self._root, name):
            return what
        if self._root not in self._listed:
            self._listed[self._root] = FolderNames(self._root)
        return self._listed[self._root].hint(_file_name(name))


def _file_name(path: str) -> str:
    return re.split(r"[\\/]", path)[-1]


def _stem(name: str) -> str:
    """A path without extension, in one word."""
    name = name[: -len(suffix)] if (suffix := known_suffix(name)) else name
    return re.sub(r"[\\/]+", "__", name.lstrip("./\\"))


def _place(row: Row, volumes: VolumeRows, subject: str) -> tuple[SlicePlace | None, str, str]:
    """Where a row's image lies; else the kind of its problem, and what is wrong."""
    try:
        place = read_place(row)
    except ValueError as error:
        return None, problems.BAD_ROW, str(error)
    if place is not None and place.volume:
        return place, *volumes.add(place, row["text"], subject, row.number)
    return place, "", ""


def _subject(image: str, volume: str) -> str:
    if volume:
        return subject_of(volume)
    case = case_of(_file_name(image))
    if (subject := subject_of(case)) != case:
        return subject
    folders = re.split(r"[\\/]", image)[:-1]
    return next((folder for folder in folders if PATIENT_FOLDER.match(folder)), _stem(image))


def _value(row: Row) -> str:
    return f"__{row['mask_value'].lstrip('#')}" if row.get("mask_value") else ""


def _digest(row: Row) -> str:
    return hashlib.sha256(row["text"].encode()).hexdigest()[:6]


def _cases(rows: Rows) -> list[str]:
    """A name for every row: its own, else the image's, made longer only where two rows would share it."""
    choices = [
        (
            row.get("case") or case_of(_file_name(row["image"])),
            _stem(row["image"]),
            f"{_stem(row['image'])}__{case_of(_file_name(row['mask']))}{_value(row)}",
            f"{_stem(row['image'])}__{case_of(_file_name(row['mask']))}{_value(row)}__{_digest(row)}",
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
