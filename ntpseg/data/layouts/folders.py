"""Finding the file that a table's row names, whatever its prefix, extension or Unicode form."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from ntpseg.data.records import MASK_PREFIX, case_of, known_suffix

IMAGE_FOLDERS = ("img", "images", "imgs", "image")
MASK_FOLDERS = ("labelcol", "gts", "ground-truths", "ground-truth", "masks", "mask", "labels")


def normalise_name(name: str) -> str:
    """`name` in composed Unicode: a table written on one system and file names from another may differ in form only."""
    return unicodedata.normalize("NFC", name)


def find_subfolder(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The sub-folder with the first of `names` (lower case) that exists in any capitalisation."""
    if not folder.is_dir():
        return None
    subfolders = {entry.name.lower(): Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()}
    return next((subfolders[name] for name in names if name in subfolders), None)


class FolderIndex:
    """The image files of one folder, found by name or by case.

    Args:
        folder: folder to list (not its sub-folders), or None for an empty index.
        masks: whether a ``mask_`` name is preferred where a case has several files.
    """

    def __init__(self, folder: Path | None, *, masks: bool) -> None:
        self.folder = folder
        self._names: dict[str, Path] = {}
        self._cases: dict[str, list[Path]] = {}
        paths = [folder / name for name in sorted(os.listdir(folder))] if folder is not None and folder.is_dir() else []
        for path in paths:
            if known_suffix(path.name) and not path.name.startswith("."):
                self._names[normalise_name(path.name)] = path
                self._cases.setdefault(case_of(normalise_name(path.name)), []).append(path)
        for files in self._cases.values():
            files.sort(key=lambda path: path.name.startswith(MASK_PREFIX) != masks)

    def find(self, name: str) -> Path | None:
        """The file called `name`; else the file of the same case (other prefix or extension); else None."""
        name = normalise_name(name)
        if name in self._names:
            return self._names[name]
        paths = self._cases.get(case_of(name))
        return paths[0] if paths else None

    def cases(self) -> set[str]:
        """The cases of all files here."""
        return set(self._cases)

    def files(self, case: str) -> list[Path]:
        """All files of a case, the preferred one first."""
        return self._cases.get(case, [])
