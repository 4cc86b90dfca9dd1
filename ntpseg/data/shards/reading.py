"""Reading a packed data set: any pair by its number, one range of a shard at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from multiprocessing import util
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.data.records import Record, SlicePlace
from ntpseg.data.shards.errors import ShardError
from ntpseg.data.shards.files import PackedFile
from ntpseg.data.shards.index import open_index
from ntpseg.data.shards.manifest import PACKED, TOKENIZERS, PackedManifest, SplitManifest, TokenLayout
from ntpseg.data.shards.storage import LocalStorage, Range, Storage, open_storage

# Bytes that were read last, which checks and decoders ask for more than once.
_RECENT = 2**26
Key = tuple[int, str]


class PackedSplit(Sequence[Record]):
    """The pairs of a split; a process holds neither their list nor their files, only what was read last.

    Args:
        storage: of the set.
        name: "train", "val" or "test".
        manifest: of the split.
        tokens: how tokens are stored; None where there are none.
    """

    def __init__(self, storage: Storage, name: str, manifest: SplitManifest, tokens: TokenLayout | None) -> None:
        self.storage, self.name, self.manifest, self.tokens = storage, name, manifest, tokens
        self._starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        self._reader: Any = None
        self._batches: dict[int, Any] = {}
        self._recent: OrderedDict[Key, bytes] = OrderedDict()
        self._held, self._lock = 0, threading.Lock()
        self._sized: set[int] = set()

    @property
    def key(self) -> str:
        """Hash of the content of all pairs in order; the same however they lie in shards."""
        return self.manifest.key

    @property
    def root(self) -> str:
        """Folder or URL of the set."""
        return self.storage.root

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: Any) -> Any:
        """The `Record` of a pair, whose files are `PackedFile`; of a slice, a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        place = self._value(row, "place")
        return Record(
            image=self.file(row, "image"),
            mask=self.file(row, "mask"),
            text=self._value(row, "text"),
            split=self.name,
            case=self._value(row, "case"),
            subject=self._value(row, "subject"),
            mask_value=self._value(row, "mask_value"),
            place=SlicePlace(**json.loads(place)) if place else None,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.root, self.name)

    def file(self, row: int, part: str) -> PackedFile:
        """The path of a pair's "image" or "mask"."""
        shard = self.manifest.shards[self._place(row)[0]].name
        name = self._value(row, f"{part}_name")
        return PackedFile(self.root, shard, f"{row:09d}", part, name, place=(self, row, part))

    def text(self, row: int) -> str:
        """The sentence of a pair."""
        return self._value(row, "text")

    def texts(self) -> Iterator[str]:
        """All sentences in order."""
        for shard in range(len(self.manifest.shards)):
            yield from self._batch(shard).column("text").to_pylist()

    def stated(self) -> set[str]:
        """The subjects that the tables of the data set named."""
        found: set[str] = set()
        for shard in range(len(self.manifest.shards)):
            batch = self._batch(shard)
            found.update(batch.column("subject").filter(batch.column("stated")).unique().to_pylist())
        return found

    def empty(self) -> np.ndarray:
        """Of each pair, whether its mask holds no finding; bool ``[N]``."""
        batches = (self._batch(shard).column("empty") for shard in range(len(self.manifest.shards)))
        return np.concatenate([batch.to_numpy(zero_copy_only=False) for batch in batches])

    def volumes(self) -> list[str]:
        """Of each pair, the name of its volume; "" for a 2-D image."""
        places = (p for shard in range(len(self._starts) - 1) for p in self._batch(shard).column("place").to_pylist())
        return [json.loads(place).get("volume", "") if place else "" for place in places]

    def size(self, row: int, part: str) -> int:
        """Bytes of a pair's "image", "mask" or "tokens"; 0 where it has none."""
        return int(self._value(row, f"{part}_size"))

    def sha256(self, row: int, part: str) -> bytes:
        """Their hash."""
        return self._value(row, f"{part}_sha256")

    def read(self, row: int, part: str) -> bytes:
        """The bytes of a pair's "image", "mask" or "tokens", which are those that were packed.

        Raises:
            ShardError: the shard is missing, cut off or changed, or cannot be reached.
        """
        with self._lock:
            content = self._recent.get((row, part))
        return self._fetch([(row, part)])[0] if content is None else content

    def prefetch(self, rows: Sequence[int], parts: Sequence[str]) -> None:
        """Read what is not at hand of several pairs, in one go; errors as of `read`."""
        with self._lock:
            missing = [(row, part) for row in rows for part in parts if (row, part) not in self._recent]
        if missing:
            self._fetch(missing)

    def check_shards(self, *, digests: bool = False) -> None:
        """Raise a `ShardError` unless every file has its size and, if asked, its SHA-256."""
        for file in (self.manifest.index, *self.manifest.shards):
            self.storage.check_size(file.name, file.bytes)
            if digests:
                self.storage.check_digest(file.name, file.sha256, file.bytes)

    def _fetch(self, keys: Sequence[Key]) -> list[bytes]:
        ranges = []
        for row, part in keys:
            shard = self._place(row)[0]
            file = self.manifest.shards[shard]
            if shard not in self._sized:
                self.storage.check_size(file.name, file.bytes)
                self._sized.add(shard)
            ranges.append(Range(file.name, int(self._value(row, f"{part}_offset")), self.size(row, part)))
        contents = self.storage.read_many(ranges)
        for key, wanted, content in zip(keys, ranges, contents):
            self._check(key, wanted, content)
        with self._lock:
            for key, content in zip(keys, contents):
                if key not in self._recent:
                    self._recent[key] = content
                    self._held += len(content)
            while self._held > _RECENT and len(self._recent) > 1:
                self._held -= len(self._recent.popitem(last=False)[1])
        return contents

    def _check(self, key: Key, wanted: Range, content: bytes) -> None:
        row, part = key
        if len(content) < wanted.size:
            file = next(shard for shard in self.manifest.shards if shard.name == wanted.name)
            self.storage.check_size(file.name, file.bytes)
        # One pass more over the bytes, at a fraction of what decoding them costs.
        if hashlib.sha256(content).digest() != self.sha256(row, part):
            raise ShardError(
                f"{self.storage.where(wanted.name)} must be what was packed, got other bytes for the {part} of case "
                f"{self._value(row, 'case')!r}; copy it again"
            )

    def _place(self, row: int) -> tuple[int, int]:
        """Shard of a pair, and its row in the shard's batch."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def _value(self, row: int, column: str) -> Any:
        shard, place = self._place(row)
        return self._batch(shard).column(column)[place].as_py()

    def _batch(self, shard: int) -> Any:
        if shard not in self._batches:
            batch = self._open().get_batch(shard)
            if batch.num_rows != self.manifest.shards[shard].samples:
                where = self.storage.where(self.manifest.index.name)
                raise ShardError(f"{where} must have the pairs that {PACKED} says, got others; copy it again")
            self._batches[shard] = batch
        return self._batches[shard]

    def _open(self) -> Any:
        with self._lock:
            if self._reader is None:
                file = self.manifest.index
                self.storage.check_size(file.name, file.bytes)
                self.storage.check_digest(file.name, file.sha256, file.bytes)
                path = self.storage.local(file.name, lambda: _copy_folder(self.root))
                self._reader = open_index(path, len(self.manifest.shards), self.storage.where(file.name))
            return self._reader


class PackedSet:
    """A packed data set.

    Args:
        storage: where its files are.
        manifest: of ``packed.json``.

    Attributes:
        splits: those that have pairs, by name.
    """

    def __init__(self, storage: Storage, manifest: PackedManifest) -> None:
        self.storage, self.manifest = storage, manifest
        self.splits = {
            name: PackedSplit(storage, name, split, manifest.tokens) for name, split in manifest.splits.items()
        }

    @property
    def root(self) -> str:
        """Folder or URL."""
        return self.storage.root

    def verify(self) -> None:
        """Read every file once and raise a `ShardError` for the first whose size or SHA-256 is not that of packing."""
        for split in self.splits.values():
            split.check_shards(digests=True)

    def tokenizers(self) -> Path:
        """The folder with ``text`` and ``vision``; of a set elsewhere a copy that is removed with this process.

        Raises:
            ShardError: a file is missing or has another size.
        """
        tokens = self.manifest.tokens
        assert tokens is not None
        path = Path()
        for name, size in tokens.files.items():
            self.storage.check_size(f"{TOKENIZERS}/{name}", size)
            path = self.storage.local(f"{TOKENIZERS}/{name}", lambda: _copy_folder(self.root))
            path = path.parents[name.count("/")]
        return path


def open_packed(path: str | PathLike[str]) -> PackedSet:
    """Open a packed data set; of a folder the size of every shard is checked, elsewhere when a shard is first read.

    Raises:
        ShardError: there is none, or a file is missing or has another size.
        ValueError: a package that it needs is not installed.
    """
    storage = open_storage(path)
    if not storage.exists(PACKED):
        raise ShardError(f"{storage.root} must be a packed data set, got no {PACKED} in it; ntpseg data pack makes one")
    found = PackedSet(storage, PackedManifest.from_json(storage.read(PACKED), storage.where(PACKED)))
    if isinstance(storage, LocalStorage):
        for split in found.splits.values():
            split.check_shards()
    return found


def _copy_folder(root: str) -> Path:
    return Path(util.get_temp_dir(), hashlib.sha256(root.encode()).hexdigest()[:16])


@functools.lru_cache(maxsize=8)
def opened(root: str) -> PackedSet:
    """`open_packed`, which this process does once for a folder or URL."""
    return open_packed(root)


def _restore(root: str, name: str) -> PackedSplit:
    return opened(root).splits[name]
