"""Which files that are there an earlier prediction wrote: these a new one replaces, and nothing else.

PNGs say so in themselves (`MARK`), a DICOM-SEG object in its series' description, NIfTI labels in the JSON file beside
them, and all of them in the ``predictions.csv`` of their folder.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path

from ntpseg.utils.files import printable, read_csv

TABLE = "predictions.csv"
# The chunk Software of the PNGs that predict writes.
MARK = "ntpseg predict"
# Columns that both tables of predictions have and those of other programs and data sets do not, and the files' columns.
_OWN_COLUMNS = {"text", "mean_confidence"}
_FILE_COLUMNS = ("mask", "labels")


class OwnOutputs:
    """The files of earlier predictions; tables are read once for each folder."""

    def __init__(self) -> None:
        self._named: dict[Path, frozenset[str] | None] = {}

    def check(self, option: str, result: Path, outputs: Iterable[Path] = ()) -> None:
        """Refuse outputs that are there and no earlier prediction's.

        Args:
            option: as the user knows it.
            result: the mask, labels or overlay, or a ``predictions.csv``.
            outputs: further files of the same result, which are an earlier prediction's where `result` is.

        Raises:
            ValueError: a file is there that would be lost.
        """
        taken = [path for path in (result, *outputs) if os.path.lexists(path)]
        if not taken or self._is_own(result):
            return
        for path in taken:
            if path == result or not _is_marked(path):
                raise ValueError(
                    f"{option} must replace results of an earlier prediction alone, got {path}, which is none; give "
                    "another folder or name"
                )

    def _is_own(self, path: Path) -> bool:
        named = self._table(path.parent)
        if path.name == TABLE:
            return named is not None
        return path.name in (named or ()) or _is_marked(path)

    def _table(self, folder: Path) -> frozenset[str] | None:
        """The files that a folder's table of predictions names; None without such a table."""
        if folder not in self._named:
            self._named[folder] = _named_in(folder / TABLE)
        return self._named[folder]


def is_own_json(path: Path) -> bool:
    """Whether a JSON file is one that an earlier prediction wrote beside labels."""
    try:
        return {"labels", "sentences"} <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _named_in(table: Path) -> frozenset[str] | None:
    try:
        rows = read_csv(table)
    except (OSError, ValueError, AttributeError, csv.Error):
        return None
    if not rows or not rows[0].keys() >= _OWN_COLUMNS:
        return None
    names = {row.get(column) for row in rows for column in _FILE_COLUMNS}
    # The table spells names that are no UTF-8 in its own way.
    return frozenset(name for name in os.listdir(table.parent) if printable(name) in names)


def _is_marked(path: Path) -> bool:
    lowered = path.name.lower()
    if lowered.endswith(".png"):
        return _software(path) == MARK
    if lowered.endswith(".dcm"):
        return _is_own_dicom(path)
    ending = next((ending for ending in (".nii.gz", ".nii", ".json") if lowered.endswith(ending)), "")
    return bool(ending) and is_own_json(path.with_name(f"{path.name[: -len(ending)]}.json"))


def _software(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return str(picture.info.get("Software", ""))
    except Exception:  # decoders of broken files raise anything
        return ""


def _is_own_dicom(path: Path) -> bool:
    from ntpseg.volumes.dicom_seg import SERIES_DESCRIPTION

    try:
        import pydicom

        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Manufacturer", "SeriesDescription"])
    except Exception:  # the package is missing, or the file is anything
        return False
    return (header.get("Manufacturer"), header.get("SeriesDescription")) == ("ntpseg", SERIES_DESCRIPTION)
