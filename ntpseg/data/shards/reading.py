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
from ntpseg.data.shards.manifest import PACKED, TOKENIZERS, PackedManifest, SplitManifest
from ntpseg.data.shards.storage import LocalStorage, Range, Storage, open_storage
from ntpseg.utils.manifest import MANIFEST, damage
from ntpseg.utils.per_process import PerProcess

# Bytes that were read last, which checks and decoders ask for more than once, and bytes that are asked for at once:
# more would have to be given up before it is used.
_RECENT = 2**26
Key = tuple[int, str]


class _Held:
    """What one process has open and in memory of a split.

    Attributes:
        reader, batches: of the index.
        recent: the parts that were read last, and `size`, their bytes.
        asked: parts that were announced and not read yet, in order.
        sized: shards whose size was compared.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reader: Any = None
        self.batches: dict[int, Any] = {}
        self.recent: OrderedDict[Key, bytes] = OrderedDict()
        self.size = 0
        self.asked: list[Key] = []
        self.sized: set[int] = set()


class PackedSplit(Sequence[Record]):
    """The pairs of a split; a process holds neither their list nor their files, only what was read last.

    Args:
        storage: of the set.
        name: "train", "val" or "test".
        manifest: of the split.
    """

    def __init__(self, storage: Storage, name: str, manifest: SplitManifest) -> None:
        self.storage, self.name, self.manifest = storage, name, manifest
        self._starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        self._index: Path | None = None  # once it was checked
        self._process = PerProcess(_Held)

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
        held, key = self._process.get(), (row, part)
        with held.lock:
            content = held.recent.get(key)
        return self._fetch(self._together(key))[0] if content is None else content

    def prefetch(self, rows: Sequence[int], parts: Sequence[str]) -> None:
        """Say which parts of several pairs will be read next, in that order; errors as of `read`.

        The first 64 MiB of those that are not at hand are read in one go, and the next whenever one of them is wanted.
        """
        held = self._process.get()
        with held.lock:
            held.asked = [(row, part) for row in rows for part in parts if (row, part) not in held.recent]
            first = held.asked[:1]
        for key in first:
            self._fetch(self._together(key))

    def check_shards(self, *, digests: bool = False) -> None:
        """Raise a `ShardError` unless every file has its size and, if asked, its SHA-256."""
        for file in (self.manifest.index, *self.manifest.shards):
            self.storage.check_size(file.name, file.bytes)
            if digests:
                self.storage.check_digest(file.name, file.sha256, file.bytes)

    def _together(self, key: Key) -> list[Key]:
        """A part, and what was announced with it, as far as it may be read at once."""
        held = self._process.get()
        with held.lock:
            asked = [each for each in held.asked if each not in held.recent]
        if key not in asked:
            return [key]
        chosen, size = [key], self.size(*key)
        for other in asked:
            if other != key:
                size += self.size(*other)
                if size > _RECENT:
                    break
                chosen.append(other)
        with held.lock:
            held.asked = [each for each in asked if each not in set(chosen)]
        return chosen

    def _fetch(self, keys: Sequence[Key]) -> list[bytes]:
        held = self._process.get()
        ranges = []
        for row, part in keys:
            shard = self._place(row)[0]
            file = self.manifest.shards[shard]
            if shard not in held.sized:
                self.storage.check_size(file.name, file.bytes)
                held.sized.add(shard)
            ranges.append(Range(file.name, int(self._value(row, f"{part}_offset")), self.size(row, part)))
        contents = self.storage.read_many(ranges)
        for key, wanted, content in zip(keys, ranges, contents):
            self._check(key, wanted, content)
        with held.lock:
            for key, content in zip(keys, contents):
                if key not in held.recent:
                    held.recent[key] = content
                    held.size += len(content)
            while held.size > _RECENT and len(held.recent) > 1:
                held.size -= len(held.recent.popitem(last=False)[1])
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
        batches = self._process.get().batches
        if shard not in batches:
            batch = self._open().get_batch(shard)
            if batch.num_rows != self.manifest.shards[shard].samples:
                where = self.storage.where(self.manifest.index.name)
                raise ShardError(f"{where} must have the pairs that {PACKED} says, got others; copy it again")
            batches[shard] = batch
        return batches[shard]

    def _open(self) -> Any:
        held, file = self._process.get(), self.manifest.index
        with held.lock:
            if held.reader is None:
                if self._index is None:
                    self._index = self.storage.local(
                        file.name, file.bytes, file.sha256, lambda: _copy_folder(self.root)
                    )
                held.reader = open_index(self._index, len(self.manifest.shards), self.storage.where(file.name))
            return held.reader


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
        self.splits = {name: PackedSplit(storage, name, split) for name, split in manifest.splits.items()}

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
            ShardError: a file is missing, or not what was packed.
        """
        tokens = self.manifest.tokens
        assert tokens is not None
        folder = Path()
        for name, size in tokens.files.items():
            path = self.storage.local(f"{TOKENIZERS}/{name}", size, None, lambda: _copy_folder(self.root))
            folder = path.parents[name.count("/")]
        if MANIFEST in tokens.files and (wrong := damage(folder)) is not None:
            raise ShardError(
                f"{self.storage.where(TOKENIZERS)} must be what was packed, got a folder where {wrong}; copy it again"
            )
        return folder


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
    else:
        # Made now, it is that of the processes that this one starts too, which then copy an index once together.
        util.get_temp_dir()
    return found


def _copy_folder(root: str) -> Path:
    return Path(util.get_temp_dir(), hashlib.sha256(root.encode()).hexdigest()[:16])


@functools.lru_cache(maxsize=8)
def opened(root: str) -> PackedSet:
    """`open_packed`, which this process does once for a folder or URL."""
    return open_packed(root)


def _restore(root: str, name: str) -> PackedSplit:
    return opened(root).splits[name]
