"""Packing a data set: its pairs, in the order of its tables, into shards of about one size."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ntpseg.data.records import SPLITS, MaskOptions, Record
from ntpseg.data.shards.errors import ShardError
from ntpseg.data.shards.formats import WRITERS, Bytes, PairKind, ShardWriter
from ntpseg.data.shards.index import PARTS, pyarrow, schema
from ntpseg.data.shards.manifest import PACKED, TOKENIZERS, PackedManifest, SplitManifest, StoredFile, TokenLayout
from ntpseg.data.shards.storage import RemoteStorage, open_storage
from ntpseg.utils.checks import check_choice, check_integer
from ntpseg.utils.files import atomic_folder
from ntpseg.utils.manifest import file_digest, write_manifest
from ntpseg.utils.outputs import check_not_mounted
from ntpseg.utils.progress import StageCallback, counter

_NO_HASH = bytes(32)


class PairTokenizer(Protocol):
    """Makes the tokens that are packed beside a pair."""

    layout: TokenLayout

    def encode(self, records: Sequence[Record]) -> Iterator[bytes]:
        """The tokens of each record in order, as `layout` says."""

    def save(self, folder: Path) -> None:
        """Write the tokenizers."""


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How a data set is packed.

    Attributes:
        format: "parquet" or "webdataset" (tar).
        shard_bytes: a shard is closed once it has so many.
        layout: of the data set, see `ntpseg.data.load_records`.
        masks: how masks are read, and whether cases without a finding are packed.
        skip_bad: leave bad pairs out instead of refusing the data set.

    Raises:
        ValueError: the format is unknown, or the size is not positive.
    """

    format: str = "parquet"
    shard_bytes: int = 2**28
    layout: str = "auto"
    masks: MaskOptions = field(default_factory=MaskOptions)
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_choice("--format", self.format, tuple(WRITERS))
        check_integer("--shard-size", self.shard_bytes, 1)


@dataclass(frozen=True, slots=True)
class Packed:
    """What was written.

    Attributes:
        manifest: ``packed.json``.
        left_out: problems of the pairs that were left out, and the pairs without a mask.
    """

    manifest: PackedManifest
    left_out: list[str]


def pack_dataset(
    source: Path,
    out: str | Path,
    options: PackOptions | None = None,
    *,
    tokenizer: PairTokenizer | None = None,
    progress: StageCallback | None = None,
) -> Packed:
    """Check a data set and pack it, files as they are.

    A folder appears complete under its name or not at all; at a URL ``packed.json``, without which there is no data
    set, is written last.

    Args:
        source: the data set, of any layout.
        out: a new folder, or an fsspec URL that can be written to.
        options: see `PackOptions`.
        tokenizer: makes tokens; None: there are none.
        progress: called as ``progress("packing", done, total)`` after every pair.

    Raises:
        ntpseg.data.DataProblems: the data set is not in order.
        ValueError: there is something at `out`, a package is not installed, or see `ntpseg.data.list_dataset`.
    """
    from ntpseg.data.checks import check_listing
    from ntpseg.data.loading import list_dataset, require_usable

    options = options or PackOptions()
    pyarrow()
    _check_out(out)
    listing = list_dataset(source, options.layout, options.masks)
    checked = check_listing(listing, options.masks)
    checked.problems[:0] = listing.problems
    require_usable(checked, source, skip_bad=options.skip_bad)
    empty = {id(record) for record in checked.empty}
    left_out = [f"{problem.name}: {problem.kind} ({problem.detail})" for problem in checked.problems]
    left_out += [f"{record.case}: no mask" for record in checked.records if record.mask is None]
    pairs = [record for record in checked.records if record.mask is not None]
    advance = counter(progress or (lambda stage, done, total: None), "packing", len(pairs))
    with _place(out) as place:
        splits = {}
        for name in SPLITS:
            if records := [record for record in pairs if record.split == name]:
                split = _Split(place, name, records, listing.patients, empty, options, tokenizer)
                splits[name] = split.write(advance)
        layout = None
        if tokenizer is not None:
            tokenizer.save(place.folder / TOKENIZERS)
            write_manifest(place.folder / TOKENIZERS)
            layout = _with_files(tokenizer.layout, place)
        manifest = PackedManifest(options.format, splits, layout)
        place.write(PACKED, manifest.to_json().encode())
    return Packed(manifest, left_out)


class _Place:
    """Where files are written.

    Args:
        folder: it, or where files are made before they go to `remote`.
        remote: the storage of a URL.
    """

    def __init__(self, folder: Path, remote: RemoteStorage | None = None) -> None:
        self.folder, self._remote = folder, remote

    def close(self, name: str) -> tuple[int, str]:
        """Size and SHA-256 of a file that is complete; one for elsewhere is sent and removed."""
        path = self.folder / name
        size, digest = path.stat().st_size, file_digest(path)
        if self._remote is not None:
            self._remote.put(path, name)
            path.unlink()
        return size, digest

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        (self.folder / name).write_bytes(content)
        self.close(name)


class _Split:
    def __init__(
        self,
        place: _Place,
        name: str,
        records: Sequence[Record],
        patients: set[str],
        empty: set[int],
        options: PackOptions,
        tokenizer: PairTokenizer | None,
    ) -> None:
        self.place, self.name, self.records, self.options = place, name, records, options
        self.patients, self.empty, self.tokenizer = patients, empty, tokenizer
        names = (path.name for record in records for path in (record.image, record.mask) if path is not None)
        self.kind = PairKind.of(names, tokenizer is not None)
        self.shards: list[StoredFile] = []
        self.digest = hashlib.sha256()

    def write(self, advance: Callable[[int], Any]) -> SplitManifest:
        pa = pyarrow()
        tokens = iter(self.tokenizer.encode(self.records)) if self.tokenizer is not None else None
        name = f"{self.name}.index.arrow"
        with (self.place.folder / name).open("wb") as file, pa.ipc.new_file(file, schema()) as index:
            rows: list[dict[str, Any]] = []
            writer: ShardWriter | None = None
            for number, record in enumerate(self.records):
                if writer is None:
                    writer = self._open()
                row = self._row(record)
                parts = self._parts(record, next(tokens) if tokens is not None else b"")
                for part, content in parts.items():
                    row[f"{part}_sha256"] = hashlib.sha256(content.data).digest() if content.data else _NO_HASH
                writer.add(number, row, parts)
                rows.append(row)
                self._count(row)
                if writer.size >= self.options.shard_bytes:
                    self._close(writer, rows, index)
                    writer, rows = None, []
                advance(1)
            if writer is not None:
                self._close(writer, rows, index)
        stored = StoredFile(name, len(self.records), *self.place.close(name))
        views = dict.fromkeys((r.place.axis, r.place.window) if r.place else ("", "") for r in self.records)
        return SplitManifest(
            key=self.digest.hexdigest()[:32],
            index=stored,
            shards=tuple(self.shards),
            empty=sum(id(record) in self.empty for record in self.records),
            views=tuple(views),
        )

    def _open(self) -> ShardWriter:
        suffix, make = WRITERS[self.options.format]
        return make(self.place.folder / f"{self.name}-{len(self.shards):05d}{suffix}", self.kind)

    def _close(self, writer: ShardWriter, rows: list[dict[str, Any]], index: Any) -> None:
        for row, ranges in zip(rows, writer.close(), strict=True):
            for part in PARTS:
                row[f"{part}_offset"], row[f"{part}_size"] = ranges.get(part, (0, 0))
        index.write_batch(pyarrow().RecordBatch.from_pylist(rows, schema=schema()))
        self.shards.append(StoredFile(writer.path.name, len(rows), *self.place.close(writer.path.name)))

    def _row(self, record: Record) -> dict[str, Any]:
        assert record.mask is not None
        return {
            "case": record.case,
            "subject": record.subject,
            "text": record.text,
            "mask_value": record.mask_value,
            "place": "" if record.place is None else json.dumps(asdict(record.place), sort_keys=True),
            "image_name": record.image.name,
            "mask_name": record.mask.name,
            "stated": record.subject in self.patients,
            "empty": id(record) in self.empty,
        }

    @staticmethod
    def _parts(record: Record, tokens: bytes) -> dict[str, Bytes]:
        assert record.mask is not None
        files = {"image": record.image, "mask": record.mask}
        parts = {part: Bytes(path.read_bytes(), path.name) for part, path in files.items()}
        return {**parts, "tokens": Bytes(tokens, "")}

    def _count(self, row: dict[str, Any]) -> None:
        content = hashlib.sha256(row["image_sha256"] + row["mask_sha256"])
        content.update(json.dumps([row["text"], row["mask_value"]]).encode())
        self.digest.update(content.digest())


def _with_files(layout: TokenLayout, place: _Place) -> TokenLayout:
    folder = place.folder / TOKENIZERS
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sizes = {name: place.close(f"{TOKENIZERS}/{name}")[0] for name in names}
    return TokenLayout(**{**{n: getattr(layout, n) for n in layout.__dataclass_fields__}, "files": sizes})


def _check_out(out: str | Path) -> None:
    storage = open_storage(out)
    if isinstance(storage, RemoteStorage):
        if storage.exists(PACKED):
            raise ShardError(f"OUT must be new, got {storage.root}, which is a packed data set; choose another")
        return
    folder = Path(storage.root)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"OUT must be a new or an empty folder, got {folder}; choose another")
    check_not_mounted("OUT", folder)


@contextmanager
def _place(out: str | Path) -> Iterator[_Place]:
    storage = open_storage(out)
    if isinstance(storage, RemoteStorage):
        folder = Path(tempfile.mkdtemp(prefix="ntpseg-pack-"))
        try:
            yield _Place(folder, storage)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    with atomic_folder(storage.root, replace=False) as folder:
        yield _Place(folder)
