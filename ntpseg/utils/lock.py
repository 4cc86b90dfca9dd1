"""Locks between processes, which the operating system releases when a process ends, however it ends."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
_TRIES = 20
_held: set[Path] = set()


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold ``folder/.lock`` inside the block; the folder is made if absent.

    A POSIX record lock: it belongs to this process alone, not to the data loader's workers, which outlive a killed
    parent by seconds. On a file system without locks (some network ones) a line warns, and the block runs.

    Args:
        folder: what only one process may write.
        what: the folder, as the user knows it.

    Raises:
        ValueError: another process holds it; the message names its id and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    if path in _held:
        raise ValueError(_taken(what, folder, f"this process ({os.getpid()})"))
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(path)
    try:
        _lock(handle, path, what, folder)
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, owner.encode())
        yield
    finally:
        _held.discard(path)
        # Closing any handle of the file gives the lock up: this is the only one.
        os.close(handle)


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Run the block in one thread of one process at a time; the others wait. The file is made, and stays.

    Where the file system has no locks, the block runs: it must stay correct, if not economical, when two are in it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: Path, what: str, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(_taken(what, folder, _owner(handle))) from error
    except OSError as error:
        print(f"{path} cannot be locked ({error.strerror}): see to it that one process writes there", file=sys.stderr)


def _owner(handle: int) -> str:
    # Who has just taken the lock may not have written yet; what is there is its dead predecessor's.
    for _ in range(_TRIES):
        try:
            os.lseek(handle, 0, os.SEEK_SET)
            owner = json.loads(os.read(handle, 4096))
            pid, host = int(owner["pid"]), str(owner["host"])
        except (ValueError, KeyError, TypeError):
            pid, host = 0, ""
        if pid and (host != socket.gethostname() or _alive(pid)):
            return f"process {pid} on {host}"
        time.sleep(0.05)
    return "another process"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _taken(what: str, folder: Path, owner: str) -> str:
    return (
        f"{what} must be written by one process at a time, got {str(folder)!r}, into which {owner} writes; wait for it"
    )
