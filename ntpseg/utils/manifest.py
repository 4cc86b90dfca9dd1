"""Manifests: the size and SHA-256 of each file of a folder, written last, so that a whole folder can be told.

A manifest finds damage: a file that is missing, cut off or differs in any bit. It is no signature, since whoever can
change the files can write the manifest anew. SHA-256 is what processors have instructions for: 1.3 GB/s on one core
where blake2b does 0.5 GB/s.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ntpseg.utils.checks import one_line
from ntpseg.utils.files import fsync_path, write_json

MANIFEST = "manifest.json"
_HASH = "sha256"
# Hashing releases the interpreter's lock; more threads than this only wait for the disk.
_THREADS = 8


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits; it is read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _HASH).hexdigest()


def write_manifest(folder: Path, name: str = MANIFEST, *, known: Mapping[str, str] | None = None) -> None:
    """Flush every file of `folder` to the disk, and then write the manifest of all of them to its file `name`.

    Args:
        folder: the folder.
        name: of the manifest.
        known: hashes of files that need not be read, see `linked_hashes`.
    """
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder) if path != folder / name}
    hashes = {file: digest for file, digest in (known or {}).items() if file in files}
    unknown = [file for file in files if file not in hashes]
    with ThreadPoolExecutor(_threads()) as pool:
        hashes.update(zip(unknown, pool.map(_flushed_digest, (files[file] for file in unknown))))
    for root, _, _ in os.walk(folder):
        fsync_path(Path(root))
    write_json(folder / name, {"bytes": {name: path.stat().st_size for name, path in files.items()}, _HASH: hashes})


def linked_hashes(folder: Path, others: Iterable[Path], name: str = MANIFEST) -> dict[str, str]:
    """Hashes, by the manifests of other folders, of those files of `folder` that are links to files there.

    What was written is what the hash tells: where the file has been damaged since, all its folders are.
    """
    linked = {path.relative_to(folder).as_posix(): path for path in _files(folder) if path.stat().st_nlink > 1}
    found: dict[str, str] = {}
    for other in others if linked else ():
        try:
            hashes = _read(other / name)[1] or {}
        except (OSError, ValueError, RecursionError):
            continue
        for file, path in linked.items():
            if file in hashes and (other / file).is_file() and path.samefile(other / file):
                found[file] = hashes[file]
    return found


def damage(folder: Path, name: str = MANIFEST, *, ignore: Iterable[str] = ()) -> str | None:
    """What is wrong with a folder, by its manifest; None where nothing is.

    Files that the manifest does not name do not count: a note or a model card may lie beside the others.

    Args:
        folder: what `write_manifest` was called for.
        name: of the manifest.
        ignore: files that may be missing or changed.

    Returns:
        One line that names the first wrong file, such as "model.safetensors is cut off (512 of 1024 bytes)".
    """
    try:
        sizes, hashes = _read(folder / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, RecursionError):
        return f"{name} is damaged"
    wanted = [file for file in sizes if file not in set(ignore)]
    for file in wanted:
        path = folder / file
        if not path.is_file():
            return f"{file} is missing"
        if (actual := path.stat().st_size) != sizes[file]:
            change = "cut off" if actual < sizes[file] else "too long"
            return f"{file} is {change} ({actual} of {sizes[file]} bytes)"
    if hashes is None:
        return None
    with ThreadPoolExecutor(_threads()) as pool:
        for file, digest in zip(wanted, pool.map(file_digest, (folder / file for file in wanted))):
            if digest != hashes[file]:
                return f"{file} is not what was written (its {_HASH} differs)"
    return None


def check_folder(what: str, folder: Path, cure: str, name: str = MANIFEST) -> None:
    """Raise a `ValueError` unless `folder` is whole; one without a manifest passes.

    Args:
        what: the folder, as the user knows it.
        folder: what `write_manifest` was called for.
        cure: what to do about it.
        name: of the manifest.
    """
    if (folder / name).is_file() and (wrong := damage(folder, name)) is not None:
        raise ValueError(f"{what} must be whole, got {str(folder)!r}, where {wrong}; {cure}")


def unreadable(file: Path) -> str | None:
    """Why a JSON or safetensors file cannot be read, in one line; None where it can, and of files of other kinds."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return one_line(error)
    return None


def _read(path: Path) -> tuple[dict[str, int], dict[str, str] | None]:
    saved: Any = json.loads(path.read_text(encoding="utf-8"))
    # Before version 0.2 the manifest of a cache held sizes alone.
    if not isinstance(saved, dict) or set(saved) not in ({"bytes"}, {"bytes", _HASH}):
        raise ValueError(f"manifest must hold bytes and {_HASH}")
    sizes, hashes = saved["bytes"], saved.get(_HASH)
    if not isinstance(sizes, dict) or not sizes or not all(type(size) is int for size in sizes.values()):
        raise ValueError("bytes must be the size of each file")
    if _HASH in saved and (not isinstance(hashes, dict) or set(hashes) != set(sizes)):
        raise ValueError(f"{_HASH} must be the hash of each file")
    if any(Path(file).is_absolute() or ".." in Path(file).parts for file in sizes):
        raise ValueError("manifest must name files of its folder")
    return sizes, hashes


def _files(folder: Path) -> list[Path]:
    return sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)


def _threads() -> int:
    return min(_THREADS, os.cpu_count() or 1)


def _flushed_digest(path: Path) -> str:
    fsync_path(path)
    return file_digest(path)


def write_json_member(folder: Path, file: str, value: Any, name: str = MANIFEST) -> None:
    """Write a JSON file of a folder that has a manifest, and the file's new hash into that.

    Files that a manifest does not name do not count, so the file leaves it before it changes: whenever this is killed,
    the folder is whole.

    Args:
        folder: what `write_manifest` was called for; without a manifest the file alone is written.
        file: its path in the folder.
        value: the content.
        name: of the manifest.
    """
    if not (folder / name).is_file():
        write_json(folder / file, value)
        return
    sizes, hashes = _read(folder / name)
    if sizes.pop(file, None) is not None:
        (hashes or {}).pop(file, None)
        _write(folder / name, sizes, hashes)
    write_json(folder / file, value)
    sizes[file] = (folder / file).stat().st_size
    if hashes is not None:
        hashes[file] = _flushed_digest(folder / file)
    _write(folder / name, sizes, hashes)


def _write(path: Path, sizes: dict[str, int], hashes: dict[str, str] | None) -> None:
    write_json(path, {"bytes": sizes} if hashes is None else {"bytes": sizes, _HASH: hashes})
