"""Where the files of a packed data set are: a folder here, or an fsspec URL such as ``s3://bucket/set``."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ntpseg.data.shards.errors import MissingFile, ShardError
from ntpseg.data.shards.manifest import PACKED
from ntpseg.utils.files import atomic_open
from ntpseg.utils.lock import waiting_lock
from ntpseg.utils.manifest import file_digest
from ntpseg.utils.per_process import PerProcess

Result = TypeVar("Result")

# Seconds before each further try of a request that failed; names of files that are not there are not tried again.
WAITS = (0.5, 2.0, 5.0)
# Open shards of a process: a set may have more of them than the system lets one open.
MAX_OPEN = 32
_CHUNK = 2**24
# What a path library makes of a URL, with one slash, is one too; a letter before a colon is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_RENEW = "copy it again"


class Range(NamedTuple):
    """`size` bytes of the file `name` from byte `start` on."""

    name: str
    start: int
    size: int


def dataset_url(path: str | PathLike[str]) -> str | None:
    """The fsspec URL that `path` is, such as ``s3://bucket/set``; None for a path of this machine.

    A URL that went through `pathlib.Path`, which takes two slashes for one, is restored.
    """
    found = _URL.fullmatch(os.fspath(path))
    if found is None or os.path.exists(path):
        return None
    protocol, rest = found[1].lower(), found[2].rstrip("/")
    return None if protocol == "file" else f"{protocol}://{rest}"


def open_storage(path: str | PathLike[str]) -> Storage:
    """The storage of a folder or a URL; a URL is not contacted yet."""
    url = dataset_url(path)
    if url is not None:
        return RemoteStorage(url)
    found = _URL.fullmatch(os.fspath(path))
    is_file_url = found is not None and found[1].lower() == "file" and not os.path.exists(path)
    return LocalStorage(Path("/" + found[2]) if found is not None and is_file_url else Path(path).expanduser())


def is_packed(path: str | PathLike[str]) -> bool:
    """Whether `path` is a packed data set: a folder with ``packed.json``, or any URL."""
    return dataset_url(path) is not None or open_storage(path).exists(PACKED)


class Storage(ABC):
    """Reads files by name; every failure is a `ShardError` of one line.

    Attributes:
        root: the folder or URL, as a user knows it.
    """

    root: str

    def where(self, name: str) -> str:
        """A file as a user knows it."""
        return f"{self.root}/{name}"

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; fewer where a file ends before."""

    def read(self, name: str) -> bytes:
        """A whole file."""
        return self.read_many([Range(name, 0, self.size(name))])[0]

    def check_size(self, name: str, expected: int) -> None:
        """Raise a `ShardError` unless the file has so many bytes."""
        actual = self.size(name)
        if actual != expected:
            change = "cut off" if actual < expected else "longer"
            raise ShardError(f"{self.where(name)} must have {expected} bytes, got {actual} ({change}); {_RENEW}")

    def check_digest(self, name: str, expected: str, size: int) -> None:
        """Raise a `ShardError` unless the file of `size` bytes has this SHA-256; all of it is read, piece by piece."""
        if self._digest(name, size) != expected:
            raise self._changed(name)

    @abstractmethod
    def local(self, name: str, size: int, sha256: str | None, folder: Callable[[], Path]) -> Path:
        """A file of this machine with the same content.

        Args:
            name: of the file.
            size: bytes that it must have.
            sha256: hash that it must have; None: it is not known.
            folder: gives the place of a copy, where one is needed. Processes may share it: one of them copies.

        Raises:
            ShardError: the file has another size or hash, or cannot be read.
        """

    @abstractmethod
    def _digest(self, name: str, size: int) -> str:
        """SHA-256 of a file, hexadecimal."""

    def _changed(self, name: str) -> ShardError:
        return ShardError(f"{self.where(name)} must be what was packed, got another SHA-256; {_RENEW}")

    def _missing(self, name: str) -> MissingFile:
        return MissingFile(f"{self.where(name)} must be a file of the packed data set, got no such file; {_RENEW}")


class _OpenFiles:
    def __init__(self) -> None:
        self.files: OrderedDict[str, FileIO] = OrderedDict()
        self.lock = threading.Lock()


class LocalStorage(Storage):
    """A folder.

    Args:
        folder: it.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self._folder = str(folder), folder
        self._opened = PerProcess(_OpenFiles)

    @property
    def open_files(self) -> int:
        """Files that are held open."""
        return len(self._opened.get().files)

    def exists(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def size(self, name: str) -> int:
        return self._named(name, lambda: (self._folder / name).stat().st_size)

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        if len(ranges) > 1 and hasattr(os, "posix_fadvise"):
            # The disk gets the whole batch at once, in place of one request after the other.
            for wanted in ranges:
                self._named(wanted.name, lambda r=wanted: self._announce(r))  # type: ignore[misc]
        return [self._named(r.name, lambda r=r: self._read(r)) for r in ranges]  # type: ignore[misc]

    def local(self, name: str, size: int, sha256: str | None, folder: Callable[[], Path]) -> Path:
        self.check_size(name, size)
        if sha256 is not None:
            self.check_digest(name, sha256, size)
        return self._folder / name

    def _digest(self, name: str, size: int) -> str:
        return self._named(name, lambda: file_digest(self._folder / name))

    def _announce(self, wanted: Range) -> None:
        file = self._file(wanted.name)
        os.posix_fadvise(file.fileno(), wanted.start, wanted.size, os.POSIX_FADV_WILLNEED)

    def _read(self, wanted: Range) -> bytes:
        file = self._file(wanted.name)
        pieces, start, left = [], wanted.start, wanted.size
        # One call reads at most 2 GiB, and a network file system less than it was asked for.
        while left and (piece := os.pread(file.fileno(), left, start)):
            pieces.append(piece)
            start, left = start + len(piece), left - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _file(self, name: str) -> FileIO:
        opened = self._opened.get()
        with opened.lock:
            if name not in opened.files:
                opened.files[name] = FileIO(self._folder / name)
                if len(opened.files) > MAX_OPEN:
                    # Not closed: another thread may be reading from it, and whoever lets go of it last closes it.
                    opened.files.popitem(last=False)
            opened.files.move_to_end(name)
            return opened.files[name]

    def _named(self, name: str, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise ShardError(
                f"{self.where(name)} must be readable, got: {error.strerror or error}; check the disk and its rights"
            ) from error


class RemoteStorage(Storage):
    """A folder at an fsspec URL; requests that fail are tried again after each of `WAITS`.

    Args:
        url: with its protocol.
    """

    def __init__(self, url: str) -> None:
        self.root = url
        self._connection = PerProcess(self._connect)

    def exists(self, name: str) -> bool:
        fs, root = self._system()
        try:
            # Not `fs.exists`, which of HTTP says no to whatever goes wrong.
            self._tried(name, lambda: fs.info(f"{root}/{name}"))
        except MissingFile:
            return False
        return True

    def size(self, name: str) -> int:
        fs, root = self._system()
        size = self._tried(name, lambda: fs.info(f"{root}/{name}"))["size"]
        if size is None:
            raise ShardError(
                f"{self.where(name)} must have a known size, got none; use a server that sends Content-Length"
            )
        return int(size)

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """One request for each range, all at once where the protocol can do that."""
        fs, root = self._system()
        results: list[Any] = [None] * len(ranges)
        left = list(range(len(ranges)))
        for wait in (*WAITS, None):
            chosen = [ranges[i] for i in left]
            paths, starts = [f"{root}/{r.name}" for r in chosen], [r.start for r in chosen]
            try:
                found = fs.cat_ranges(paths, starts, [r.start + r.size for r in chosen], on_error="return")
            except Exception as error:  # any of a transport's own
                found = [error] * len(left)
            failed = []
            for i, content in zip(left, found):
                results[i] = content
                if _is_missing(content):
                    raise self._missing(ranges[i].name)
                if isinstance(content, BaseException):
                    failed.append(i)
                elif len(content) > ranges[i].size:
                    raise ShardError(
                        f"{self.where(ranges[i].name)} must come in ranges, got the whole file; use a server that "
                        "answers HTTP range requests"
                    )
            left = failed
            if not left:
                return results
            if wait is not None:
                time.sleep(wait)
        raise self._failed(ranges[left[0]].name, results[left[0]])

    def local(self, name: str, size: int, sha256: str | None, folder: Callable[[], Path]) -> Path:
        target = folder() / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(target.with_name(f"{target.name}.lock")):
            if not target.is_file() or target.stat().st_size != size or sha256 not in (None, file_digest(target)):
                self.check_size(name, size)
                digest, written = hashlib.sha256(), 0
                # Under another name until it is whole and checked: a process may have the old one mapped.
                with atomic_open(target) as file:
                    for piece in self._pieces(name, size):
                        digest.update(piece)
                        written += file.write(piece)
                    if written != size or sha256 not in (None, digest.hexdigest()):
                        raise self._changed(name)
        return target

    def put(self, source: Path, name: str) -> None:
        """Write a file under a name."""
        fs, root = self._system()

        def write() -> None:
            fs.makedirs(root, exist_ok=True)
            fs.put_file(str(source), f"{root}/{name}")

        self._tried(name, write)

    def _system(self) -> tuple[Any, str]:
        """The file system and the path in it."""
        return self._connection.get()

    def _connect(self) -> tuple[Any, str]:
        try:
            import fsspec

            fs, root = fsspec.core.url_to_fs(self.root)
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise ShardError(
                f"{self.root} must be read by a package that is not installed ({reason}); "
                'run: pip install "ntpseg[streaming]", for s3:// and gs:// also s3fs or gcsfs'
            ) from error
        except ValueError as error:
            raise ShardError(f"{self.root} must have a protocol that fsspec knows, got: {error}") from error
        return fs, str(root).rstrip("/")

    def _pieces(self, name: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, _CHUNK):
            yield self.read_many([Range(name, start, min(_CHUNK, size - start))])[0]

    def _digest(self, name: str, size: int) -> str:
        digest = hashlib.sha256()
        for piece in self._pieces(name, size):
            digest.update(piece)
        return digest.hexdigest()

    def _tried(self, name: str, action: Callable[[], Result]) -> Result:
        for wait in (*WAITS, None):
            try:
                return action()
            except Exception as error:  # any of a transport's own
                if _is_missing(error):
                    raise self._missing(name) from error
                if wait is None:
                    raise self._failed(name, error) from error
                time.sleep(wait)
        raise AssertionError

    def _failed(self, name: str, error: BaseException) -> ShardError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ShardError(
            f"{self.where(name)} must be readable, got in {len(WAITS) + 1} tries: {reason}; check the server, the "
            "network and the rights"
        )


def _is_missing(error: object) -> bool:
    """Whether a file is not there: `FileNotFoundError`, unless fsspec made it of a refused connection or a 503."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410)
