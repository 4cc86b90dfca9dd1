"""Which images to segment with which sentences, and where the results go."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from ntpseg.data.layouts.folders import FolderNames
from ntpseg.data.records import known_suffix
from ntpseg.data.tables import read_table
from ntpseg.utils.outputs import name_key


@dataclass(frozen=True)
class Job:
    """One image to segment.

    Attributes:
        image: the image file.
        text: the sentence.
        name: file name of the results without extension.
    """

    image: Path
    text: str
    name: str


def folder_jobs(folder: Path, text: str | None, table: Path | None) -> list[Job]:
    """Pair the images of a folder with one sentence for all, or with those of a table.

    Args:
        folder: its image files count, not those of folders inside it.
        text: the sentence for every image.
        table: a table (CSV or Excel, see `read_table`) with the columns ``image`` (a file's name, with or without
            extension) and ``text``. An image may have several rows; images without one are left out.

    Raises:
        ValueError: not exactly one of `text` and `table` is given, the table has no such column, no or a malformed
            row, a row without a sentence, or it names an image that is not there.
    """
    if (text is None) == (table is None):
        number = "none" if text is None else "both"
        raise ValueError(f"exactly one of text and texts must be given for a folder, got {number}")
    # A link to nothing is listed with the images that cannot be read.
    found = (p for p in folder.iterdir() if p.is_file() or (p.is_symlink() and not p.exists()))
    files = sorted(p for p in found if known_suffix(p.name) and not p.name.startswith("."))
    if not files:
        raise ValueError(f"image must be a folder with at least one image, got {folder}, a folder without images")
    if table is None:
        pairs = [(file, text or "") for file in files]
    else:
        pairs = _rows(table, FolderNames(folder))
    return _name_results(pairs)


def _rows(path: Path, names: FolderNames) -> list[tuple[Path, str]]:
    """The images and sentences of a table; a `ValueError` for the first row that cannot be used."""
    table = read_table(path)
    for wanted in ("image", "text"):
        if wanted not in table.columns:
            raise ValueError(f"texts must have the columns image and text, got no column {wanted!r} in {path}")
    table.require(("image", "text"))
    table.refuse_faults()
    if not table.rows:
        raise ValueError(f"texts must have at least one row below its header, got none in {path}")
    pairs = []
    for row in table.rows:
        file = names(row["image"])
        if file is None:
            raise ValueError(
                f"texts must name images of {names.folder}, got {row['image']!r}, which is not in it, "
                f"in row {row.number} of {path}{names.hint(row['image'])}"
            )
        if reason := row.missing_text("text"):
            raise ValueError(f"texts must have a sentence in each row, got row {row.number} of {path}: {reason}")
        pairs.append((file, row["text"]))
    return pairs


def _name_results(pairs: list[tuple[Path, str]]) -> list[Job]:
    """Name the results after the images; a second sentence or a second file of one stem is numbered.

    The first takes the stem, the others ``STEM_2``, ``STEM_3`` ... except those that are another image's stem. Stems
    that differ in letter case alone count as one.
    """
    taken = {name_key(file.stem) for file, _ in pairs}
    seen: set[str] = set()
    jobs = []
    for file, text in pairs:
        name = file.stem
        if name_key(name) in seen:
            names = (f"{file.stem}_{number}" for number in itertools.count(2))
            name = next(name for name in names if name_key(name) not in taken)
        seen.add(name_key(name))
        taken.add(name_key(name))
        jobs.append(Job(file, text, name))
    return jobs
