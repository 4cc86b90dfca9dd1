"""The Arrow file of a split: a row per pair, a record batch per shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ntpseg.data.shards.errors import ShardError

# What a pair has bytes of in a shard.
PARTS = ("image", "mask", "tokens")


def pyarrow() -> Any:
    """The package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f'a packed data set must have the package pyarrow, got none ({error}); run: pip install "ntpseg[streaming]"'
        ) from error
    return pyarrow


def schema() -> Any:
    """Columns of the Arrow file.

    ``X_offset`` and ``X_size`` are the bytes of a part X in its shard (size 0: there is none), ``X_sha256`` is their
    hash, ``X_name`` the name of the file that they were; ``stated``: the table of the data set named the subject;
    ``empty``: the mask holds no finding; ``place``: a `SlicePlace` as JSON, or "".
    """
    pa = pyarrow()
    texts = ("case", "subject", "text", "mask_value", "place", "image_name", "mask_name")
    fields = [pa.field(name, pa.string(), nullable=False) for name in texts]
    fields += [pa.field(name, pa.bool_(), nullable=False) for name in ("stated", "empty")]
    for part in PARTS:
        fields += [pa.field(f"{part}_{name}", pa.int64(), nullable=False) for name in ("offset", "size")]
        fields.append(pa.field(f"{part}_sha256", pa.binary(32), nullable=False))
    return pa.schema(fields)


def open_index(path: Path, shards: int, where: str) -> Any:
    """The reader of an Arrow file, memory-mapped.

    Raises:
        ShardError: it is not an index of so many shards.
    """
    pa = pyarrow()
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        fits = reader.num_record_batches == shards and reader.schema.equals(schema())
    except (pa.ArrowException, OSError) as error:
        raise ShardError(
            f"{where} must be an Arrow file, got: {' '.join(str(error).split())}; copy it again"
        ) from error
    if not fits:
        raise ShardError(f"{where} must have the columns and shards that packed.json says, got others; copy it again")
    return reader
