"""A bundle as one file: a zip of its directory, with a model card, for passing on."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ntpseg.utils.files import atomic_open

SUFFIX = ".zip"
# What an archive may hold unpacked: far above any model that is passed on this way, far below a full disk.
MAX_BYTES = 8 * 2**30
# Zip files cannot express an earlier date; one date makes equal content equal bytes.
_DATE = (1980, 1, 1, 0, 0, 0)


def pack_bundle(directory: Path, target: Path, card: str) -> Path:
    """Write a bundle's directory and its card into one file; equal content gives equal bytes.

    Args:
        directory: what `Bundle.save_pretrained` wrote.
        target: the file, ending in .zip.
        card: the model card, Markdown; becomes README.md.

    Raises:
        ValueError: `target` does not end in .zip.
    """
    if target.suffix != SUFFIX:
        raise ValueError(f"archive must end in {SUFFIX}, got {str(target)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    files.pop("README.md", None)
    with atomic_open(target) as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(_entry("README.md"), card)
        for name, path in files.items():
            archive.writestr(_entry(name), path.read_bytes())
    return target


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


@functools.cache
def unpack_bundle(file: Path) -> Path:
    """The directory to which an archive is unpacked, until the process ends.

    Raises:
        ValueError: not an archive of a bundle, a damaged one, or one whose entries leave their directory or are larger
            than `MAX_BYTES` together.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check(file, entries)
            folder = Path(tempfile.mkdtemp(prefix="ntpseg-model-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            for entry in entries:
                archive.extract(entry, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"model file must be an archive of `ntpseg pack`, got {str(file)!r} ({error})") from error
    return folder


def _check(file: Path, entries: list[zipfile.ZipInfo]) -> None:
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in entry.filename:
            raise ValueError(f"model file must hold relative paths, got {entry.filename!r} in {str(file)!r}")
    size = sum(entry.file_size for entry in entries)
    if size > MAX_BYTES:
        raise ValueError(f"model file must unpack to {MAX_BYTES} bytes at most, got {size} in {str(file)!r}")
