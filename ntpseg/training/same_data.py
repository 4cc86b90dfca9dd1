"""Whether the data of a run is still what it was: a hash of each pair's files and sentence, in ``RUN/data.jsonl``.

Tokens, and the numbers of the samples in the hard-token memory, belong to the data that was there at the start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ntpseg.data import Record, load_records
from ntpseg.tokenizers.preprocess import parallel_map
from ntpseg.training.config import RunConfig
from ntpseg.training.packed_data import data_rows, packed_of
from ntpseg.utils.files import write_jsonl
from ntpseg.utils.manifest import file_digest

DATA = "data.jsonl"
# Of a row, in the words of a message.
_PARTS = {"image": "image", "mask": "mask", "text": "caption", "other": "row"}
_NAMED = 3
_DIGITS = 32


def write_data(config: RunConfig, run: Path) -> None:
    """Write ``RUN/data.jsonl``: a line per pair of the training and validation splits, bad ones included.

    Of a packed data set it is a line per split, with the hash that packing has made of its pairs.
    """
    write_jsonl(run / DATA, _now(config))


def check_same_data(config: RunConfig, run: Path) -> None:
    """Refuse to continue a run whose data has changed; names and order of the pairs alone do not count.

    Raises:
        ValueError: pairs were added or removed, or an image, a mask or a caption is another; one line says what.
    """
    path = run / DATA
    if not path.is_file():
        print(f"{run} is of an earlier release: whether its data is still the same is not known", file=sys.stderr)
        return
    before = _read(path)
    try:
        now = _now(config)
    except (ValueError, OSError) as error:
        raise ValueError(f"resume must find the data of {path}, got: {error}; put it back") from error
    if _content(before) == _content(now):
        return
    changes = _changes(before, now)
    raise ValueError(
        f"resume must find the data that the run was made from, got {', '.join(changes)}: its tokens are those of the "
        f"former data; put that back into {config.data.path}, or give --overwrite or another output to train on the "
        "new data from the start (all of it is tokenised again)"
    )


def in_stored_order(records: Sequence[Record], run: Path) -> list[Record]:
    """`records` in the order of ``RUN/data.jsonl``, which is that of the run's sample ids."""
    path = run / DATA
    if not path.is_file():
        return list(records)
    places: dict[tuple[Any, ...], int] = {}
    for place, row in enumerate(_read(path)):
        places.setdefault(_key(row), place)
    rows = _rows(records)
    order = sorted(range(len(rows)), key=lambda index: places.get(_key(rows[index]), len(places)))
    return [records[index] for index in order]


def _now(config: RunConfig) -> list[dict[str, Any]]:
    packed = packed_of(config)
    return _rows(_listed(config)) if packed is None else data_rows(packed)


def _listed(config: RunConfig) -> list[Record]:
    if config.data.path is None:
        raise ValueError("data.path must be the folder of a data set, got null")
    records = load_records(config.data.path, config.data.layout, skip_bad=True)
    return [record for record in records if record.split != "test" and record.mask is not None]


def _rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    return list(parallel_map(_row, records))


def _row(record: Record) -> dict[str, Any]:
    # Where a slice lies enters no token, and what epochs are drawn by is in the run's own sampling.json.
    skipped = ("image", "mask", "text", "split", "case", "subject", "place")
    other = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in skipped}
    return {
        "split": record.split,
        "case": record.case,
        "image": _file_digest(record.image),
        "mask": _file_digest(record.mask),
        "text": _digest(record.text.encode()),
        "other": _digest(json.dumps(other, sort_keys=True, default=str).encode()),
    }


def _file_digest(path: Path | None) -> str:
    try:
        return file_digest(path)[:_DIGITS] if path else _digest(b"")
    except OSError:
        return "unreadable"  # the check of the data set says so


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            _key(row)
            row["case"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold the data of the run, got a damaged file; start again with --overwrite"
        ) from error
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["split"], *(row[part] for part in _PARTS))


def _content(rows: Sequence[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    return Counter(map(_key, rows))


def _changes(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    old, new = ({(row["split"], row["case"]): row for row in rows} for rows in (before, now))
    both = [case for case in new if case in old]
    found = [("pair", "more", [c for c in new if c not in old]), ("pair", "gone", [c for c in old if c not in new])]
    found += [(word, "changed", [c for c in both if old[c][part] != new[c][part]]) for part, word in _PARTS.items()]
    return [
        f"{len(cases)} {word}{'s' * (len(cases) > 1)} {verb} ({_names(cases)})" for word, verb, cases in found if cases
    ] or ["pairs in other splits"]


def _names(cases: Sequence[tuple[str, str]]) -> str:
    return ", ".join(repr(case) for _, case in cases[:_NAMED]) + (", ..." if len(cases) > _NAMED else "")
