"""Packed data sets: shards of images, masks, sentences and tokens, read by byte ranges from a disk or a network.

A packed set is ``packed.json`` (`PackedManifest`), for every split an Arrow file with a row per pair, and shards:
Parquet or tar files that other programs read as they are (`datasets.load_dataset`, WebDataset). The Arrow file says at
which byte of which shard a pair's files lie, and their SHA-256, so a pair is read by its number, whatever the order,
the number of ranks and of workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntpseg.utils.lazy import lazy_exports

_EXPORTS = {
    "PackedFile": "ntpseg.data.shards.files",
    "PackedManifest": "ntpseg.data.shards.manifest",
    "PackedSet": "ntpseg.data.shards.reading",
    "PackedSplit": "ntpseg.data.shards.reading",
    "ShardError": "ntpseg.data.shards.errors",
    "TokenLayout": "ntpseg.data.shards.manifest",
    "dataset_url": "ntpseg.data.shards.storage",
    "is_packed": "ntpseg.data.shards.storage",
    "open_packed": "ntpseg.data.shards.reading",
}

__all__ = [
    "PackedFile",
    "PackedManifest",
    "PackedSet",
    "PackedSplit",
    "ShardError",
    "TokenLayout",
    "dataset_url",
    "is_packed",
    "open_packed",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from ntpseg.data.shards.errors import ShardError as ShardError
    from ntpseg.data.shards.files import PackedFile as PackedFile
    from ntpseg.data.shards.manifest import PackedManifest as PackedManifest
    from ntpseg.data.shards.manifest import TokenLayout as TokenLayout
    from ntpseg.data.shards.reading import PackedSet as PackedSet
    from ntpseg.data.shards.reading import PackedSplit as PackedSplit
    from ntpseg.data.shards.reading import open_packed as open_packed
    from ntpseg.data.shards.storage import dataset_url as dataset_url
    from ntpseg.data.shards.storage import is_packed as is_packed
