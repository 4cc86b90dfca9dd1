"""``packed.json``: the files of a packed data set, with counts, sizes and hashes; it is written last."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ntpseg.data.records import SPLITS
from ntpseg.data.shards.errors import ShardError

PACKED = "packed.json"
TOKENIZERS = "tokenizers"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a packed set.

    Attributes:
        name: in the set's folder.
        samples: pairs in it.
        bytes: its size.
        sha256: of its content, hexadecimal.
    """

    name: str
    samples: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        # A manifest may come from anyone: it names files of its own folder alone.
        if not self.name or self.name in (".", "..") or any(sign in self.name for sign in "/\\\0:"):
            raise ValueError(f"name must be that of a file in the set, got {self.name!r}")
        if not (isinstance(self.samples, int) and isinstance(self.bytes, int) and min(self.samples, self.bytes) >= 0):
            raise ValueError(f"{self.name} must have counts >= 0, got {self.samples} samples and {self.bytes} bytes")


@dataclass(frozen=True, slots=True)
class SplitManifest:
    """The files of a split.

    Attributes:
        key: hash of the content of all pairs in order; neither names nor shards count.
        index: the Arrow file with a row per pair, a record batch per shard.
        shards: in the order of the pairs.
        empty: pairs whose mask holds no finding.
        views: every different (axis, window) of the pairs; "" where it is unknown.
    """

    key: str
    index: StoredFile
    shards: tuple[StoredFile, ...]
    empty: int = 0
    views: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if sum(shard.samples for shard in self.shards) != self.index.samples:
            raise ValueError(f"shards must hold the {self.index.samples} pairs of {self.index.name}")

    @property
    def samples(self) -> int:
        """Number of pairs."""
        return self.index.samples


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """How the tokens of a pair are stored: ids of the sentence, codes of the image and of the mask, end to end.

    Attributes:
        dtype: "<u2" or "<u4", unsigned integers of 2 or 4 bytes, the lowest first.
        image_grid, mask_grid: (h, w), codes of an image and of a mask; the rest of a pair's numbers are the sentence's.
        image_size: S, pixels of a side at which pairs were tokenised.
        channels: 1 or 3.
        vision, text: fingerprints of the tokenizers, which are in the set's folder ``tokenizers``.
        files: size of each file of that folder, by its path in it.
    """

    dtype: str
    image_grid: tuple[int, int]
    mask_grid: tuple[int, int]
    image_size: int
    channels: int
    vision: str
    text: str
    files: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PackedManifest:
    """A packed data set.

    Attributes:
        format: "parquet" or "webdataset".
        splits: by name; those that have pairs.
        tokens: how tokens are stored; None where there are none.
    """

    format: str
    splits: dict[str, SplitManifest]
    tokens: TokenLayout | None = None

    def to_json(self) -> str:
        """The content of ``packed.json``."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> PackedManifest:
        """The inverse of `to_json`.

        Args:
            text: the content.
            where: the file, for the message.

        Raises:
            ShardError: it is not what `to_json` wrote, or of a later release.
        """
        try:
            content: Any = json.loads(text)
            version = content.pop("version")
            if version != _VERSION:
                raise ValueError(f"version {version}; this release reads {_VERSION}")
            splits = {name: _split(entry) for name, entry in content.pop("splits").items()}
            if set(splits) - set(SPLITS):
                raise ValueError(f"splits {', '.join(splits)}")
            tokens = content.pop("tokens")
            content.pop("layout", None)  # which earlier sets name and nothing reads
            return cls(splits=splits, tokens=None if tokens is None else _tokens(tokens), **content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ShardError(
                f"{where} must say what was packed, got a damaged file ({' '.join(str(error).split())}); copy it again"
            ) from error


def _split(entry: dict[str, Any]) -> SplitManifest:
    shards = tuple(StoredFile(**shard) for shard in entry.pop("shards"))
    views = tuple((str(axis), str(window)) for axis, window in entry.pop("views"))
    return SplitManifest(index=StoredFile(**entry.pop("index")), shards=shards, views=views, **entry)


def _tokens(entry: dict[str, Any]) -> TokenLayout:
    grids = {name: (int(entry[name][0]), int(entry[name][1])) for name in ("image_grid", "mask_grid")}
    if entry["dtype"] not in ("<u2", "<u4"):
        raise ValueError(f"tokens of dtype {entry['dtype']}")
    for name in entry["files"]:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"tokenizer file {name!r}")
    return TokenLayout(**{**entry, **grids})
