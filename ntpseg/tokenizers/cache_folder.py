"""A cache in ``DIR/<key>/``: complete under its name or not there, checked when it is opened.

The key is a hash of everything that the content depends on. A folder is built under another name, flushed, and renamed,
so one of that name is complete; the size and hash of each file are checked all the same, and a damaged one is rebuilt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntpseg.data.shards.files import PackedFile
from ntpseg.tokenizers.preprocess import parallel_map
from ntpseg.utils.files import atomic_folder, remove_folder, remove_stale_folders
from ntpseg.utils.manifest import damage, file_digest, write_manifest

if TYPE_CHECKING:
    from ntpseg.data import Record

_META = "meta.json"
# To be raised when `ntpseg.data` reads other pixels from the same files.
_READING = 2


def build_cache(directory: Path, key: str, write: Callable[[Path], None]) -> None:
    """Make the cache `key`, unless it is there and complete.

    Several processes may build the same cache at once: one of them wins, all get the same content.

    Args:
        directory: where caches are; created if absent.
        key: the cache's folder.
        write: fills an empty folder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_stale_folders(directory)
    path = directory / key
    if path.exists():
        wrong = damage(path, _META)
        if wrong is None:
            return
        print(f"building the damaged cache {path} again: {wrong}", file=sys.stderr)
        remove_folder(path)
    # Where another process has been quicker, its cache has the same content.
    with contextlib.suppress(FileExistsError), atomic_folder(path, replace=False) as folder:
        write(folder)
        write_manifest(folder, _META)


def check_cache(directory: Path, key: str) -> Path:
    """The path of the cache `key` in `directory`, all its files as they were written (of a cache of a release before
    0.3 their sizes alone are known).

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = directory / key
    if not path.is_dir():
        raise ValueError(f"key must be that of a cache in {str(directory)!r}, got {key!r}; build it first")
    with damage_named(path):
        wrong = damage(path, _META)
        if wrong is not None:
            raise ValueError(wrong)
    return path


@contextlib.contextmanager
def damage_named(path: Path) -> Any:
    """Turn what goes wrong when the cache at `path` is read into a `ValueError` that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cache {str(path)!r} must be complete, got a damaged one ({error}); build it again"
        ) from error


def content_key(settings: dict[str, Any], dataset: Iterable[Record]) -> str:
    """Hash of `settings` and of the records' file contents, sentences and mask values in order, without file names."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for content in parallel_map(_record_digest, dataset):
        digest.update(content)
    return digest.hexdigest()[:32]


def _record_digest(record: Record) -> bytes:
    digest = hashlib.sha256()
    for path in (record.image, record.mask):
        # File by file, so that no byte can move from one to the other unnoticed.
        known = path.sha256 if isinstance(path, PackedFile) else None
        digest.update(known or (bytes.fromhex(file_digest(path)) if path else hashlib.sha256().digest()))
    digest.update(record.text.encode())
    # The class of a label map, and how pixels are read: a cache of an older reading must not be taken for this one's.
    digest.update(f"{_READING} {record.mask_value}".encode())
    return digest.digest()
