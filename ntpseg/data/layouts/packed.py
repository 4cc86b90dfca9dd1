"""A packed data set (`ntpseg data pack`) as a data set like any other."""

from __future__ import annotations

from pathlib import Path

from ntpseg.data.layouts.base import Layout, Listing
from ntpseg.data.shards import is_packed, open_packed


def read_packed(path: Path) -> Listing:
    """List the pairs of a packed data set, a folder or a URL; no shard is opened.

    Raises:
        ValueError: it is not complete, see `open_packed`.
    """
    found = open_packed(path)
    listing = Listing(Path(found.root))
    for split in found.splits.values():
        listing.records += list(split)
        listing.patients |= split.stated()
    return listing


PACKED_SET = Layout("packed", is_packed, read_packed, "packed.json", verify=lambda path: open_packed(path).verify())
