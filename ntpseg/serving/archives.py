"""Unpacking what is uploaded compressed, with limits on what comes out; names inside an archive are never used."""

from __future__ import annotations

import errno
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused

CHUNK = 2**20
GZIP = b"\x1f\x8b"
# Endings that readers look at; a file without one is recognised by its content.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".ppm", ".pgm"),
    *(".dcm", ".ima", ".nii", ".nrrd", ".mha", ".mhd"),
)
# Bytes of one entry in the directory of an archive, name included: far more than tools write.
ENTRY_BYTES = 1024
# A full disk is no damaged archive, from which a seek to nowhere may come.
_OWN_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE)


class UploadFolder:
    """A private folder that an upload's files are written into, numbered, so that no name of theirs is ever a path.

    Args:
        folder: empty, of this upload alone.
        options: its limits.
    """

    def __init__(self, folder: Path, options: ServerOptions) -> None:
        self.folder, self.options = folder, options
        self.files: list[Path] = []
        self._bytes = 0

    def add(self, name: str, source: IO[bytes]) -> None:
        """Take over one uploaded file, an archive's members instead of itself, a compressed file decompressed.

        Raises:
            Refused: too many files or bytes, or a damaged or encrypted archive.
        """
        start = source.read(4)
        source.seek(0)
        if start not in (b"PK\x03\x04", b"PK\x05\x06"):
            self._write(name, source)
            return
        try:
            self._add_members(source)
        except (
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            EOFError,
            NotImplementedError,
            OSError,
            RuntimeError,
        ) as error:
            if isinstance(error, OSError) and error.errno in _OWN_FAULTS:
                raise
            raise Refused(400, "the archive must be a readable .zip file, got a damaged one") from error

    def _add_members(self, source: IO[bytes]) -> None:
        check_directory(source, self.options.max_files * ENTRY_BYTES)
        with zipfile.ZipFile(source) as archive:
            for member in members(archive):
                if member.flag_bits & 1:
                    raise Refused(400, "the archive must not be encrypted; unpack it first")
                with archive.open(member) as unpacked:
                    self._write(member.filename, unpacked)

    def _write(self, name: str, source: IO[bytes]) -> None:
        if len(self.files) >= self.options.max_files:
            raise Refused(413, f"an upload must have at most {self.options.max_files:,} files, got more")
        packed = source.read(2) == GZIP
        source.seek(0)
        suffix = PurePosixPath(name.removesuffix(".gz").replace("\\", "/")).suffix.lower()
        path = self.folder / f"{len(self.files):06d}{suffix if suffix in SUFFIXES else ''}"
        with path.open("xb") as file:
            try:
                self._copy(gzip.GzipFile(fileobj=source, mode="rb") if packed else source, file)  # type: ignore[arg-type]
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise Refused(400, "a compressed file must be readable, got a damaged one; copy it again") from error
        self.files.append(path)

    def _copy(self, source: IO[bytes], file: IO[bytes]) -> None:
        first = True
        while chunk := source.read(CHUNK):
            # Readers would decompress it themselves, without our limits.
            if first and chunk.startswith(GZIP):
                raise Refused(400, "a file must be compressed at most once, got one compressed twice")
            first = False
            self._bytes += len(chunk)
            if self._bytes > self.options.max_unpacked_bytes:
                limit = self.options.max_unpacked_bytes // 2**20
                raise Refused(413, f"an upload must have at most {limit:,} MiB when unpacked, got more")
            file.write(chunk)


def members(archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    """The files of an archive that a person put there."""
    for member in archive.infolist():
        parts = PurePosixPath(member.filename.replace("\\", "/")).parts
        hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
        if not (member.is_dir() or hidden or "__MACOSX" in parts or (parts and parts[-1] == "DICOMDIR")):
            yield member


def check_directory(source: IO[bytes], limit: int) -> None:
    """Refuse an archive whose directory alone would fill the memory: `zipfile` reads all of it at once."""
    length = source.seek(0, 2)
    source.seek(max(0, length - 2**16 - 22 - 20))
    tail = source.read()
    source.seek(0)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise Refused(400, "the archive must be a readable .zip file, got a damaged one")
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    if size > limit or tail[max(0, end - 20) : end].startswith(b"PK\x06\x07"):
        raise Refused(413, "the archive must have fewer files, got too many; drop the files of one series alone")
