"""Finding the file that a table's row names, whatever its prefix, extension or Unicode form."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ntpseg.data.records import MASK_PREFIX, case_of, known_suffix

IMAGE_FOLDERS = ("img", "images", "imgs", "image")
MASK_FOLDERS = ("labelcol", "gts", "ground-truths", "ground-truth", "masks", "mask", "labels")
_MASK_SUFFIX = re.compile(r"[_-]mask$")
_FLOAT = re.compile(r"^(\d+)\.0+$")
# Hints cost a search: none after so many files and so many missing names.
_SEARCHED, _HINTED = 100_000, 50


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
        self._masks = masks
        self._names: dict[str, Path] = {}
        self._cases: dict[str, list[Path]] = {}
        self._deeper: dict[str, Path] | None = None
        self._hinted = 0
        paths = [folder / name for name in sorted(os.listdir(folder))] if folder is not None and folder.is_dir() else []
        for path in paths:
            if known_suffix(path.name) and not path.name.startswith(".") and path.is_file():
                self._names[normalise_name(path.name)] = path
                self._cases.setdefault(case_of(normalise_name(path.name)), []).append(path)
        self._sort()

    def find(self, name: str) -> Path | None:
        """The file called `name`; else the file of the same case (other prefix or extension); else the only one whose
        case differs in capitals, in ``_mask`` at the end, or as the number ``1.0`` differs from ``1``; else None."""
        name = normalise_name(name)
        if name in self._names:
            return self._names[name]
        case = case_of(name)
        if case not in self._cases:
            case = self._matcher(case) or case
        paths = self._cases.get(case)
        return paths[0] if paths else None

    def adopt(self, cases: Iterable[str]) -> None:
        """Count files under the one of `cases` that they mean, where they have none of these names themselves."""
        known = set(cases)
        matcher = NameMatcher(known)
        for case in sorted(set(self._cases) - known):
            meant = matcher(case)
            if meant is not None and meant not in self._cases:
                self._cases[meant] = self._cases.pop(case)
        self._sort()

    def hint(self, name: str) -> str:
        """What is there instead of `name`, for a message; "" where nothing like it is."""
        if self.folder is None:
            return ""
        if what := no_file(self.folder, name):
            return what
        if self._deeper is None:
            self._deeper = {case_of(normalise_name(path.name)): path for path in files_below(self.folder)}
        if path := self._deeper.get(case_of(normalise_name(name))):
            place = path.relative_to(self.folder.parent).as_posix()
            return f"; {place} has this name: files must lie in {self.folder.name} itself, not in a folder inside"
        self._hinted += 1
        if self._hinted > _HINTED:
            return ""
        close = difflib.get_close_matches(name, self._names, 1, 0.8)
        return _meant(name, self._names) or (f"; is {close[0]} meant?" if close else "")

    def cases(self) -> set[str]:
        """The cases of all files here."""
        return set(self._cases)

    def files(self, case: str) -> list[Path]:
        """All files of a case, the preferred one first."""
        return self._cases.get(case, [])

    def _sort(self) -> None:
        self._matcher = NameMatcher(self._cases)
        for files in self._cases.values():
            files.sort(key=lambda path: path.name.startswith(MASK_PREFIX) != self._masks)


def _without_suffix(text: str) -> str:
    return _MASK_SUFFIX.sub("", text.casefold())


def plain_number(text: str) -> str:
    """`text` in lower case, a whole number with zeros behind its point without them."""
    return _FLOAT.sub(r"\1", text.casefold())


class NameMatcher:
    """Finds the only one of several names that another name can mean.

    Args:
        names: to choose from, without extension.
        keys: how names are compared, in this order. By default: in other capitals, without ``_mask`` at the end, as a
            number that a spreadsheet program wrote (``1.0`` for ``1``).
    """

    def __init__(
        self,
        names: Iterable[str],
        keys: Sequence[Callable[[str], str]] = (str.casefold, _without_suffix, plain_number),
    ) -> None:
        self._keys = keys
        self._found: list[dict[str, list[str]]] = [{} for _ in keys]
        for name in names:
            for key, found in zip(keys, self._found):
                found.setdefault(key(name), []).append(name)

    def __call__(self, name: str) -> str | None:
        """The name that `name` means; None where none would do, or more than one."""
        found = next((hits for key, by_key in zip(self._keys, self._found) if (hits := by_key.get(key(name)))), [])
        return found[0] if len(found) == 1 else None


class FolderNames:
    """The files of one folder by what a row may call them.

    Args:
        folder: folder to list (not its sub-folders).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        self._names = {normalise_name(entry.name): entry for entry in entries}
        stems = [(name[: -len(suffix)], name) for name in self._names if (suffix := known_suffix(name))]
        self._stems = dict(reversed(stems))
        self._by_name = NameMatcher(self._names, (str.casefold,))
        self._by_stem = NameMatcher(self._stems, (str.casefold, plain_number))
        self._below: dict[str, Path] | None = None
        self._hinted = 0

    def __call__(self, name: str) -> Path | None:
        """The file `name`, or of this name without extension (the first of several); else the only one that differs
        in capitals alone, or as the number ``1.0`` differs from ``1``; else None."""
        name = normalise_name(name)
        if name in self._names:
            return self._names[name]
        # Not the same name with another extension: it may be the mask of an image, or the image of a mask.
        meant = self._stems.get(name) or self._by_name(name)
        if meant is None and not known_suffix(name):
            stem = self._by_stem(name)
            meant = None if stem is None else self._stems[stem]
        return None if meant is None else self._names[meant]

    def hint(self, name: str) -> str:
        """What is there instead of `name`, for a message; "" where nothing like it is."""
        if what := no_file(self.folder, name):
            return what
        if self._below is None:
            below = reversed(list(files_below(self.folder)))
            self._below = {normalise_name(path.name).casefold(): path for path in below}
        found = self._below.get(normalise_name(name).casefold())
        if found is not None:
            return f"; {found.relative_to(self.folder).as_posix()} has this name"
        self._hinted += 1
        return _meant(name, self._names) if self._hinted <= _HINTED else ""


def no_file(folder: Path, name: str) -> str:
    """Of what bears the name of a file and is none, what it is, for a message; "" where nothing bears it."""
    path = folder / name.replace("\\", "/")
    try:
        if not name:
            return ""
        if path.is_dir():
            return "; what has this name is a folder"
        return "; what has this name is a link to nothing" if path.is_symlink() and not path.exists() else ""
    except (OSError, ValueError):  # too long, or with a NUL
        return ""


def _meant(name: str, names: Iterable[str]) -> str:
    """Which of `names` is meant by a `name` that is none, for a message; "" where none or several may be."""
    files = list(names)
    stem = _stem(re.split(r"[/\\]", normalise_name(name))[-1])
    if found := _only(file for file in files if _stem(file) == stem):
        return f"; is {found} meant? write the name without its folder"
    if stem.isdecimal() and (found := _only(f for f in files if _stem(f).lstrip("0") == stem.lstrip("0"))):
        return f"; is {found} meant? the table lost the zeros in front: make its column text"
    if found := _only(file for file in files if re.match(rf"{re.escape(stem)}[^0-9a-z]", _stem(file))):
        return f"; is {found} meant? name it {stem}{known_suffix(found)}"
    return ""


def _stem(name: str) -> str:
    return name.removesuffix(known_suffix(name)).casefold()


def _only(names: Iterable[str]) -> str:
    found = list(names)
    return found[0] if len(found) == 1 else ""


def files_below(folder: Path) -> Iterator[Path]:
    """The image files in the folders inside `folder`, at most some thousands of them."""
    count = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        if Path(place) != folder:
            for name in sorted(names):
                if known_suffix(name):
                    yield Path(place, name)
        count += len(names)
        if count > _SEARCHED:
            return
