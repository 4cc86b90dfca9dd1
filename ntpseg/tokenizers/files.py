"""Files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

_STALE_SECONDS = 24 * 3600


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, flush it to the disk, and rename it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_stale(directory: Path, prefix: str) -> None:
    """Remove folders named `prefix...` that a killed process left more than a day ago."""
    for path in directory.glob(f"{prefix}*"):
        try:
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)
