"""The files that pairs are packed into, and where in them each pair's bytes lie."""

from __future__ import annotations

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ntpseg.data.records import known_suffix
from ntpseg.data.shards.index import PARTS, pyarrow

# Bytes of a Parquet row group: what a reader of the whole file, such as `datasets`, holds at once.
ROW_GROUP = 2**24
# What Pillow opens, which `datasets` shows as an image; medical files stay bytes.
_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm")

# Of each part: its first byte in the shard, and the number of bytes.
Ranges = dict[str, tuple[int, int]]


class Bytes(NamedTuple):
    """A file.

    Attributes:
        data: its content; b"": there is none.
        name: its name.
    """

    data: bytes
    name: str


class PairKind(NamedTuple):
    """What all pairs of a split have in common; its shards must declare the same columns.

    Attributes:
        tokens: they have tokens.
        pictures: images and masks are all of formats that `datasets` shows as pictures.
    """

    tokens: bool
    pictures: bool

    @classmethod
    def of(cls, names: Iterable[str], tokens: bool) -> PairKind:
        """That of pairs with images and masks of these names."""
        return cls(tokens, all(name.lower().endswith(_PICTURES) for name in names))


class ShardWriter(ABC):
    """Writes a shard.

    Args:
        path: the file.
        kind: of the pairs of its split.

    Attributes:
        size: bytes that were written, about.
    """

    def __init__(self, path: Path, kind: PairKind) -> None:
        self.path, self.kind, self.size = path, kind, 0

    @abstractmethod
    def add(self, number: int, row: dict[str, Any], parts: dict[str, Bytes]) -> None:
        """Add pair `number`: its columns of the index, and the files of "image", "mask" and "tokens"."""

    @abstractmethod
    def close(self) -> list[Ranges]:
        """Complete the file; of each pair in order, where its parts lie."""


class ParquetShard(ShardWriter):
    """Columns image and mask (bytes and name, as `datasets.Image` stores them), text, case ..., and tokens.

    Files are compressed as they are, so the shard is not, and a value is one stretch of the file. One that comes
    several times in a row group, as the image of several sentences, is stored once (a dictionary page).
    """

    def __init__(self, path: Path, kind: PairKind) -> None:
        super().__init__(path, kind)
        self._file = path.open("w+b")
        self._writer: Any = None
        self._rows: list[dict[str, Any]] = []
        self._parts: list[dict[str, Bytes]] = []
        self._waiting = 0
        self._ranges: list[Ranges] = []

    def add(self, number: int, row: dict[str, Any], parts: dict[str, Bytes]) -> None:
        self._rows.append(row)
        self._parts.append(parts)
        new = sum(len(content.data) for content in parts.values())
        self._waiting += new
        self.size += new
        if self._waiting >= ROW_GROUP:
            self._flush()

    def close(self) -> list[Ranges]:
        if self._rows:
            self._flush()
        self._writer.close()
        self._file.close()
        return self._ranges

    def _flush(self) -> None:
        start = self._file.tell()
        table = self._table()
        if self._writer is None:
            self._writer = self._open(table.schema)
            start = self._file.tell()
        self._writer.write_table(table, row_group_size=len(self._rows))
        self._file.flush()
        end = self._file.tell()
        self._file.seek(start)
        written = self._file.read(end - start)
        self._file.seek(end)
        self._ranges += _find(written, start, self._parts)
        self._rows, self._parts, self._waiting = [], [], 0

    def _open(self, schema: Any) -> Any:
        pyarrow()
        import pyarrow.parquet as pq

        return pq.ParquetWriter(
            self._file,
            schema,
            compression="none",
            use_dictionary=["image.bytes", "mask.bytes", "text"],
            dictionary_pagesize_limit=2**30,
            write_statistics=["case", "subject"],
        )

    def _table(self) -> Any:
        pa = pyarrow()
        file = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns: dict[str, Any] = {
            part: pa.array([{"bytes": p[part].data, "path": p[part].name} for p in self._parts], file)
            for part in ("image", "mask")
        }
        for name in ("text", "case", "subject", "mask_value", "place"):
            columns[name] = pa.array([row[name] for row in self._rows], pa.string())
        if self.kind.tokens:
            columns["tokens"] = pa.array([p["tokens"].data for p in self._parts], pa.binary())
        table = pa.table(columns)
        features = _features(table.column_names, self.kind.pictures)
        return table.replace_schema_metadata({"huggingface": json.dumps(features)})


class TarShard(ShardWriter):
    """Of pair 7 the members 000000007.png, 000000007.mask.png, .txt, .json and, with tokens, .tokens.bin."""

    def __init__(self, path: Path, kind: PairKind) -> None:
        super().__init__(path, kind)
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  # closed by `close`
        self._ranges: list[Ranges] = []

    def add(self, number: int, row: dict[str, Any], parts: dict[str, Bytes]) -> None:
        key = f"{number:09d}"
        names = {"image": _suffix(parts["image"].name), "mask": f".mask{_suffix(parts['mask'].name)}"}
        found = {part: self._member(key + name, parts[part].data) for part, name in names.items()}
        if self.kind.tokens:
            found["tokens"] = self._member(f"{key}.tokens.bin", parts["tokens"].data)
        self._member(f"{key}.txt", row["text"].encode())
        described = {name: row[name] for name in ("case", "subject", "mask_value", "place")}
        self._member(f"{key}.json", json.dumps(described, ensure_ascii=False).encode())
        self._ranges.append(found)

    def close(self) -> list[Ranges]:
        self._tar.close()
        return self._ranges

    def _member(self, name: str, content: bytes) -> tuple[int, int]:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o644
        self._tar.addfile(member, io.BytesIO(content))
        self.size = self._tar.offset
        blocks = -(-len(content) // tarfile.BLOCKSIZE)
        return self._tar.offset - blocks * tarfile.BLOCKSIZE, len(content)


WRITERS: dict[str, tuple[str, Callable[[Path, PairKind], ShardWriter]]] = {
    "parquet": (".parquet", ParquetShard),
    "webdataset": (".tar", TarShard),
}


def _find(written: bytes, start: int, pairs: Iterable[dict[str, Bytes]]) -> list[Ranges]:
    """Where the values of a row group lie in it: column after column, each in order, repeated ones once."""
    pairs = list(pairs)
    found: list[Ranges] = [{} for _ in pairs]
    cursor = 0
    for part in PARTS:
        seen: dict[bytes, int] = {}
        for ranges, pair in zip(found, pairs):
            value = pair[part].data
            if not value:
                continue
            if value not in seen:
                place = written.find(value, cursor)
                if place < 0:
                    raise RuntimeError(f"the {part} of a pair must be one stretch of the shard, got another encoding")
                seen[value], cursor = place, place + len(value)
            ranges[part] = (start + seen[value], len(value))
    return found


def _suffix(name: str) -> str:
    return (known_suffix(name) or Path(name).suffix or ".bin").lower()


def _features(columns: list[str], pictures: bool) -> dict[str, Any]:
    """What `datasets` writes into the schema of its own Parquet files: which columns are images."""
    image: dict[str, Any] = {"_type": "Image"}
    if not pictures:
        image = {"bytes": {"dtype": "binary", "_type": "Value"}, "path": {"dtype": "string", "_type": "Value"}}
    kinds = {"image": image, "mask": image, "tokens": {"dtype": "binary", "_type": "Value"}}
    text = {"dtype": "string", "_type": "Value"}
    return {"info": {"features": {name: kinds.get(name, text) for name in columns}}}
