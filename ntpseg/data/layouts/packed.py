"""A packed data set (`ntpseg data pack`) as a data set like any other."""

from __future__ import annotations

from pathlib import Path

from ntpseg.data.layouts.base import Layout, Listing
from ntpseg.data.shards.storage import is_packed


def read_packed(path: Path) -> Listing:
    """List the pairs of a packed data set, a folder or a URL; no shard is opened.

    Raises:
        ValueError: it is not complete, see `open_packed`.
    """
    # NumPy with it, which commands that read no table need not wait for.
    from ntpseg.data.shards.reading import open_packed

    found = open_packed(path)
    listing = Listing(Path(found.root))
    for split in found.splits.values():
        listing.records += list(split)
        listing.patients |= split.stated()
    return listing


def verify_packed(path: Path) -> None:
    """Read every shard once.

    Raises:
        ValueError: one is not what was packed.
    """
    from ntpseg.data.shards.reading import open_packed

    open_packed(path).verify()


PACKED_SET = Layout("packed", is_packed, read_packed, "packed.json", verify_packed)
