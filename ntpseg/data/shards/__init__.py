"""Packed data sets: shards of images, masks, sentences and tokens, read by byte ranges from a disk or a network.

A packed set is ``packed.json`` (`PackedManifest`), for every split an Arrow file with a row per pair, and shards:
Parquet or tar files that other programs read as they are (`datasets.load_dataset`, WebDataset). The Arrow file says at
which byte of which shard a pair's files lie, and their SHA-256, so a pair is read by its number, whatever the order,
the number of ranks and of workers.
"""

from __future__ import annotations

from ntpseg.data.shards.errors import ShardError
from ntpseg.data.shards.files import PackedFile
from ntpseg.data.shards.manifest import PackedManifest, TokenLayout
from ntpseg.data.shards.reading import PackedSet, PackedSplit, is_packed, open_packed
from ntpseg.data.shards.storage import dataset_url

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
