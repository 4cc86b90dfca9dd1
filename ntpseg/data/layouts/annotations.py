"""What the layouts have in common whose sentences lie in JSON files or in file names: one mask, several sentences."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntpseg.data import problems
from ntpseg.data.layouts.base import Listing
from ntpseg.data.layouts.folders import FolderNames, files_below, no_file
from ntpseg.data.records import Record, known_suffix
from ntpseg.data.tables import is_sentence

# Some annotation files of whole collections hold a million masks.
MAX_BYTES = 2**30
# Folders and JSON files that are named after a split. A demo is there to be looked at: nothing is trained on it.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "demo"),
}


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8.

    Raises:
        ValueError: it is no such file; says what it is instead, and the cure, without its name.
    """
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise ValueError(
            "an empty file (0 bytes); copy it again" if not size else f"{size:,} bytes, too many; split it"
        )
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("a Git LFS pointer instead of the file; run git lfs pull")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("another encoding than UTF-8; save it as UTF-8") from None
    except RecursionError:
        raise ValueError("lists in lists without an end; it is no annotation file") from None
    except ValueError as error:
        raise ValueError(f"no JSON ({error}); copy it again") from None


class SplitFiles:
    """The files of one folder, and of folders inside it where a name has a folder in front.

    Args:
        folder: the folder that names are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[Path, FolderNames] = {}

    def find(self, name: str) -> Path | None:
        """The file `name`, in whichever Unicode form or capitals it is stored; None where there is none."""
        try:
            path = self.folder / name.replace("\\", "/")
            if path.is_file():
                return path
            found = self._names(path.parent)(path.name)
        except (OSError, ValueError):  # too long, or with a NUL
            return None
        return found if found is not None and found.is_file() else None

    def hint(self, name: str) -> str:
        """What is there instead of `name`, for a message; "" where nothing like it is."""
        if what := no_file(self.folder, name):
            return what
        return self._names(self.folder).hint(name.replace("\\", "/").rsplit("/", 1)[-1])

    def all(self) -> list[Path]:
        """Every image file here and in the folders inside, by name."""
        if not self.folder.is_dir():
            return []
        here = [path for path in sorted(self.folder.iterdir()) if known_suffix(path.name) and path.is_file()]
        below = list(files_below(self.folder))
        return [path for path in here + below if not path.name.startswith(".")]

    def _names(self, folder: Path) -> FolderNames:
        if folder not in self._listed:
            self._listed[folder] = FolderNames(folder)
        return self._listed[folder]


@dataclass(frozen=True, slots=True)
class _Pair:
    image: Path
    mask: Path
    text: str
    subject: str


class Pairs:
    """Collects the pairs of one split: every sentence of a mask is one.

    Args:
        split: "train", "val" or "test".
        images, masks: where the files lie.
        listing: receives the records and the problems.
    """

    def __init__(self, split: str, images: SplitFiles, masks: SplitFiles, listing: Listing) -> None:
        self.split, self.images, self.masks, self.listing = split, images, masks, listing
        self._pairs: dict[tuple[Path, Path, str], _Pair] = {}
        self._named: set[Path] = set()

    def add(self, where: str, image_name: str, mask_name: str, sentences: Sequence[str], subject: str) -> None:
        """One annotation; `where` names it in messages.

        Args:
            image_name, mask_name: relative to the folders of images and masks; "" where the annotation has none.
            sentences: what may be said of the mask, each a pair of its own; repeated ones count once.
            subject: whose image it is.
        """
        image, mask = (
            files.find(name) if name else None for files, name in ((self.images, image_name), (self.masks, mask_name))
        )
        self._named |= {path for path in (image, mask) if path is not None}
        if image is None:
            detail = f"there is no {image_name} in {self._short(self.images)}{self.images.hint(image_name)}"
            self._report(problems.MISSING_IMAGE, where, detail if image_name else "it names no image")
        elif mask is None:
            detail = f"there is no {mask_name} in {self._short(self.masks)}{self.masks.hint(mask_name)}"
            self._report(problems.MISSING_MASK, where, detail if mask_name else "it names no mask")
        elif not any(map(is_sentence, sentences)):
            self._report(problems.MISSING_TEXT, where, "it has no sentence")
        else:
            # Empty ones beside others are placeholders, such as the prompt "p0" of MedVLSM.
            for text in dict.fromkeys(text.strip() for text in sentences if is_sentence(text)):
                key = (image, mask, text)
                if key in self._pairs:
                    self._report(problems.DUPLICATE, where, f"{text!r} is there twice for {mask_name}; it counts once")
                self._pairs.setdefault(key, _Pair(image, mask, text, subject))

    def entries(self, name: str, value: Any) -> Iterable[tuple[int, dict[str, Any]]]:
        """The objects of a list in the JSON file `name` with their places from 0; what is none is reported."""
        for place, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, dict):
                yield place, item
            else:
                self._report(problems.BAD_ROW, f"{name} entry {place}", f"it must be an object, got {str(item)[:40]!r}")

    def finish(self, described_by: str = "") -> None:
        """Make the records, and report the files that the annotations do not name, where `described_by` has these."""
        pairs = list(self._pairs.values())
        for pair, case in zip(pairs, self._cases(pairs)):
            self.listing.records.append(Record(pair.image, pair.mask, pair.text, self.split, case, pair.subject))
        for files, what in ((self.images, "it"), (self.masks, "this mask")) if described_by else ():
            for path in files.all():
                if path not in self._named:
                    self._report(problems.MISSING_TEXT, path, f"{described_by} does not name {what}")

    def _cases(self, pairs: Sequence[_Pair]) -> list[str]:
        """The mask's name, with a digest of the sentence where a mask has several."""
        names = [_stem(pair.mask, self.masks.folder) for pair in pairs]
        names = _longer(names, [f"{n}__{_digest(p.text)}" for n, p in zip(names, pairs)])
        return _longer(names, [f"{_stem(p.image, self.images.folder)}__{n}" for n, p in zip(names, pairs)])

    def _report(self, kind: str, where: str | Path, detail: str) -> None:
        self.listing.report(kind, self.split, where, detail)

    def _short(self, files: SplitFiles) -> str:
        return self.listing.short(files.folder)


def _longer(names: list[str], longer: list[str]) -> list[str]:
    counts = Counter(names)
    return [other if counts[name] > 1 else name for name, other in zip(names, longer)]


def _stem(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    return name.removesuffix(known_suffix(name)).replace("/", "__")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def texts_of(value: Any) -> list[str]:
    """The texts in a text, or in a list of texts and lists, in order; what is neither is left out."""
    if isinstance(value, str):
        return [_encodable(value)]
    return [text for item in value for text in texts_of(item)] if isinstance(value, list) else []


def name_of(value: Any) -> str:
    """A file name of a JSON file; "" where it is no text."""
    return _encodable(value).strip() if isinstance(value, str) else ""


def _encodable(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON can hold and no file can be called."""
    return text.encode("utf-8", "replace").decode("utf-8")
