"""A file inside a shard, as a path: what opens paths reads it without knowing."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections import OrderedDict
from multiprocessing import util
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ntpseg.utils.per_process import PerProcess

if TYPE_CHECKING:
    from ntpseg.data.shards.reading import PackedSplit

# Copies for libraries that open files by name, of which the latest are kept.
_COPIES = 16


class _Copies:
    def __init__(self) -> None:
        self.paths: OrderedDict[str, Path] = OrderedDict()
        self.lock = threading.Lock()


_copies = PerProcess(_Copies)


class PackedFile(type(Path())):  # type: ignore[misc]  # the path class of this system
    """The path of a file in a shard: ``SET/SHARD/NUMBER/PART/NAME``.

    `open`, `read_bytes` and `stat` read the shard. Only where the operating system is given the path
    (``os.fspath``: by readers of DICOM, NIfTI and NRRD) a copy is written to a temporary folder, which is removed with
    the process; the latest few are kept. Paths derived from it (``parent``) are ordinary ones.

    Args:
        name: the path.
        split, row, part: the pair's, and "image" or "mask".
    """

    _place: tuple[PackedSplit, int, str] | None = None

    def __new__(cls, *names: Any, place: tuple[PackedSplit, int, str] | None = None) -> PackedFile:
        made = super().__new__(cls, *names)
        made._place = place
        return made

    if sys.version_info >= (3, 12):

        def __init__(self, *names: Any, place: tuple[PackedSplit, int, str] | None = None) -> None:
            super().__init__(*names)

        def with_segments(self, *segments: Any) -> Path:
            return Path(*segments)

    @property
    def sha256(self) -> bytes | None:
        """Of the content, as the set's index has it; None of a derived path."""
        if self._place is None:
            return None
        split, row, part = self._place
        return split.sha256(row, part)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._place is None:
            return (Path, (str(self),))
        split, row, part = self._place
        return _restore, (split, row, part)

    def __fspath__(self) -> str:
        return str(self) if self._place is None else str(self._copy())

    def read_bytes(self) -> bytes:
        if self._place is None:
            return super().read_bytes()
        split, row, part = self._place
        return split.read(row, part)

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        if self._place is None:
            return super().open(mode, *args, **kwargs)
        if mode != "rb":
            raise ValueError(f"mode must be 'rb' for a file of a packed data set, got {mode!r}")
        return io.BytesIO(self.read_bytes())

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        if self._place is None:
            return super().stat(follow_symlinks=follow_symlinks)
        split, row, part = self._place
        # The number stands for the content, so that one file under several names counts once.
        inode = int.from_bytes(split.sha256(row, part)[:7], "big") + 1
        return os.stat_result((0o100444, inode, -1, 1, 0, 0, split.size(row, part), 0, 0, 0))

    def exists(self, **options: Any) -> bool:
        return self._place is not None or super().exists(**options)

    def is_file(self, **options: Any) -> bool:
        return self._place is not None or super().is_file(**options)

    def is_dir(self, **options: Any) -> bool:
        return self._place is None and super().is_dir(**options)

    def resolve(self, strict: bool = False) -> Path:
        return self if self._place is not None else super().resolve(strict)

    def _copy(self) -> Path:
        assert self._place is not None
        split, row, part = self._place
        key = f"{os.getpid()}/{split.sha256(row, part).hex()}/{self.name}"
        copies = _copies.get()
        with copies.lock:
            path = copies.paths.get(key)
            if path is None or not path.exists():
                path = Path(util.get_temp_dir(), *key.split("/"))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.read_bytes())
                copies.paths[key] = path
                while len(copies.paths) > _COPIES:
                    copies.paths.popitem(last=False)[1].unlink(missing_ok=True)
            copies.paths.move_to_end(key)
            return path


def _restore(split: PackedSplit, row: int, part: str) -> PackedFile:
    return split.file(row, part)
