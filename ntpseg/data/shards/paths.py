"""From the path of a file in a shard, as tables and messages show it, back to the file."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from ntpseg.data.shards.manifest import PACKED
from ntpseg.data.shards.reading import opened
from ntpseg.data.shards.storage import dataset_url

_INSIDE = re.compile(r"(.+)/([^/]+\.(?:parquet|tar))/(\d{9,})/(image|mask)/[^/]+", re.DOTALL)


def as_path(path: str | PathLike[str]) -> Path:
    """`path` as a `Path`; ``SET/SHARD/NUMBER/PART/NAME``, which is no file, as a `PackedFile`.

    Raises:
        ShardError: the packed set is damaged.
    """
    if isinstance(path, Path) and type(path) is not type(Path()):
        return path
    found = _INSIDE.fullmatch(Path(path).as_posix())
    if found is None or (dataset_url(found[1]) is None and not Path(found[1], PACKED).is_file()):
        return Path(path)
    for split in opened(dataset_url(found[1]) or found[1]).splits.values():
        row = int(found[3])
        if row < len(split) and any(shard.name == found[2] for shard in split.manifest.shards):
            return split.file(row, found[4])
    return Path(path)
