"""Checks of what a command will write, before it computes anything: nothing is lost by a name.

Every check raises a `ValueError` that names the option, the path and the cure.
"""

from __future__ import annotations

import errno
import os
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ntpseg.utils.files import file_identity

MAX_NAME_BYTES = 255  # of one name, in every file system in common use


def check_not_inputs(option: str, outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input under any name: the same path, a link, another spelling."""
    known = {}
    for path in inputs:
        identity = file_identity(path)
        if identity is not None:
            known[identity] = path
    for output in outputs:
        identity = file_identity(output)
        if identity in known:
            raise ValueError(
                f"{option} must not replace what is read, got {output}, which is the input {known[identity]}; "
                "choose another place"
            )


def check_distinct(option: str, outputs: Iterable[Path]) -> None:
    """Refuse two outputs of one name; names that differ in case alone are one on many file systems."""
    seen: dict[str, Path] = {}
    for output in outputs:
        key = name_key(os.path.realpath(output))
        if key in seen:
            raise ValueError(f"{option} must give every result a file of its own, got {output} twice")
        seen[key] = output


def name_key(name: str) -> str:
    """Equal for names that some file system takes for one: letter case and Unicode composition do not count."""
    return unicodedata.normalize("NFC", name).casefold()


def same_place(first: Path, second: Path) -> bool:
    """Whether two paths, which need not exist, are one file or folder."""
    if first.exists() and second.exists():
        return os.path.samefile(first, second)
    return os.path.realpath(first) == os.path.realpath(second)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, links resolved."""
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to."""
    check_path(option, folder)
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{option} must be a folder, got {folder}, where {existing} is a file; choose another")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} must be where files can be written, got {folder} ({error.strerror}); {cure(error)}"
        ) from error


def check_file(option: str, path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a file of another kind than is written, one that is a folder, and one that cannot be written.

    Args:
        option: as the user knows it.
        path: the file; one that exists will be replaced.
        suffixes: endings that the content may have; none: any.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} must end in {' or '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got {path}, which is a folder")
    check_name(option, path.name)
    check_folder(option, path.parent)


def check_not_mounted(option: str, path: Path) -> None:
    """Refuse a folder that another one cannot be renamed to."""
    if os.path.ismount(path):
        raise ValueError(f"{option} must not be a mounted folder itself, got {path}; give the name of one inside it")


def check_path(option: str, path: Path) -> None:
    """Refuse a path whose names no file system takes, before asking the operating system about it fails."""
    for part in path.parts:
        check_name(option, part)


def check_name(option: str, name: str) -> None:
    """Refuse a name that file systems do not take."""
    size = len(os.fsencode(name))
    if size > MAX_NAME_BYTES:
        raise ValueError(
            f"{option} must have names of at most {MAX_NAME_BYTES} bytes (a letter may take 4), got {size}: "
            f"{name[:40]}...; shorten it"
        )


def cure(error: OSError) -> str:
    """What to do about a failed write."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)):
        return "free space there and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose another folder, or get the right to write there"
    if error.errno == errno.ENOENT:
        return "check the path"
    return "choose another place"
