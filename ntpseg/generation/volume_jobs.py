"""Which volumes to segment with which sentences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ntpseg.data.tables import is_sentence, read_table
from ntpseg.utils.outputs import name_key

# Endings of volumes that are left out of a result's name; ".nii.gz" is one.
_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".img", ".img.gz", ".hdr.gz", ".dcm", ".dicom")


@dataclass(frozen=True, slots=True)
class VolumeJob:
    """One volume to segment.

    Attributes:
        volume: a file, or a folder of DICOM slices.
        texts: the sentences, each once.
        name: file name of the results without ending.
    """

    volume: Path
    texts: tuple[str, ...]
    name: str


def find_volumes(path: Path, series: str | None = None) -> list[Path]:
    """The volumes of a path: itself, or those right inside a folder, in the order of their names; [] for pictures.

    A folder is itself a volume where slices of DICOM lie in it, where it holds nothing but one folder of them, or where
    `series` chooses one of several.
    """
    from ntpseg.volumes.reading import is_volume, kind_of

    if not path.is_dir():
        return [path] if is_volume(path) else []
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    inside = [entry for entry in entries if is_volume(entry)]
    loose = any(entry.is_file() and entry not in inside and kind_of(entry) == "dicom" for entry in entries)
    nested = len(inside) == 1 and inside[0].is_dir()
    return [path] if (loose or nested or series is not None) and is_volume(path) else inside


def volume_jobs(volumes: Sequence[Path], texts: Sequence[str], table: Path | None) -> list[VolumeJob]:
    """Pair volumes with sentences for all of them, or with those of a table.

    Args:
        volumes: the volumes; of several ones of one name the results are numbered.
        texts: the sentences for every volume.
        table: a table (CSV or Excel, see `read_table`) with the columns ``text`` and, needed for several volumes,
            ``image``: a volume's name, with or without ending. Volumes without a row are left out.

    Raises:
        ValueError: not exactly one of `texts` and `table` is given, a sentence that says nothing or is given twice, or
            a table without the columns, with a row that cannot be used, or that names no volume.
    """
    if bool(texts) == (table is not None):
        number = "both" if texts else "none"
        raise ValueError(f"exactly one of text and texts must be given for a volume, got {number}")
    for text in texts:
        if not is_sentence(text):
            raise ValueError(f"text must be a sentence that says what to segment, got {text!r}")
    chosen = {volume: list(texts) for volume in volumes} if table is None else _rows(table, volumes)
    names: set[str] = set()
    jobs = []
    taken = {name_key(stem(volume)) for volume in volumes}
    for volume, sentences in chosen.items():
        twice = next((text for text in sentences if sentences.count(text) > 1), None)
        if twice is not None:
            raise ValueError(f"text must be given once for each label of {volume.name}, got {twice!r} twice")
        name = stem(volume)
        if name_key(name) in names:
            numbered = (f"{stem(volume)}_{number}" for number in itertools.count(2))
            name = next(name for name in numbered if name_key(name) not in names | taken)
        names.add(name_key(name))
        jobs.append(VolumeJob(volume, tuple(sentences), name))
    return jobs


def stem(volume: Path) -> str:
    """The name of a volume without its ending; a folder's name whole."""
    if volume.is_dir():
        return volume.resolve().name or "volume"
    lowered = volume.name.lower()
    ending = next((ending for ending in _ENDINGS if lowered.endswith(ending) and lowered != ending), "")
    return volume.name[: len(volume.name) - len(ending)]


def _rows(path: Path, volumes: Sequence[Path]) -> dict[Path, list[str]]:
    table = read_table(path)
    needed = ("image", "text") if len(volumes) > 1 else ("text",)
    for wanted in needed:
        if wanted not in table.columns:
            raise ValueError(
                f"texts must have the columns {' and '.join(needed)}, got no column {wanted!r} in {path}"
                if len(needed) > 1
                else f"texts must have the column text, got none in {path}"
            )
    table.require([name for name in ("image", "text") if name in table.columns])
    table.refuse_faults()
    if not table.rows:
        raise ValueError(f"texts must have at least one row below its header, got none in {path}")
    known: dict[str, list[Path]] = {}
    for volume in volumes:
        for name in {volume.name, stem(volume)}:
            known.setdefault(name_key(name), []).append(volume)
    chosen: dict[Path, list[str]] = {}
    for row in table.rows:
        matching = known.get(name_key(Path(row["image"].replace("\\", "/")).name), []) if "image" in row else volumes
        if len(matching) != 1:
            number = "none of this name" if not matching else "several of this name; give the ending"
            raise ValueError(f"texts must name volumes, got {row['image']!r}, {number}, in row {row.number} of {path}")
        if reason := row.missing_text("text"):
            raise ValueError(f"texts must have a sentence in each row, got row {row.number} of {path}: {reason}")
        chosen.setdefault(matching[0], []).append(row["text"])
    return {volume: chosen[volume] for volume in volumes if volume in chosen}
