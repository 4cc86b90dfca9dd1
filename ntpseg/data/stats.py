"""Counts and sizes of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ntpseg.data.checks import examine_files
from ntpseg.data.images import read_mask
from ntpseg.data.records import SPLITS, Record


@dataclass(frozen=True, slots=True)
class SplitStats:
    """One split in figures.

    Args:
        split: "train", "val" or "test".
        pairs: number of records.
        images: number of different image files (one file under several names counts once).
        subjects: number of subjects.
        captions: number of different sentences.
        unseen: number of these sentences that training does not have.
        area: 25 %, 50 % and 75 % quantile of the masks' area as a fraction of their image; NaN without a readable mask.
        words: median number of words of a sentence.
    """

    split: str
    pairs: int
    images: int
    subjects: int
    captions: int
    unseen: int
    area: tuple[float, float, float]
    words: float


def split_stats(records: Sequence[Record]) -> list[SplitStats]:
    """Figures of every split that has records; opens every mask (unreadable ones are left out of the areas)."""
    areas = examine_files((record.mask for record in records if record.mask is not None), _area)
    known = {record.text for record in records if record.split == "train"}
    stats = []
    for split in SPLITS:
        own = [record for record in records if record.split == split]
        if not own:
            continue
        texts = {record.text for record in own}
        values = [area for record in own if record.mask and isinstance(area := areas[record.mask], float)]
        low, middle, high = np.percentile(values, (25, 50, 75)) if values else (np.nan,) * 3
        stats.append(
            SplitStats(
                split=split,
                pairs=len(own),
                images=len({(stat.st_dev, stat.st_ino) for record in own if (stat := record.image.stat())}),
                subjects=len({record.subject for record in own}),
                captions=len(texts),
                unseen=len(texts - known),
                area=(float(low), float(middle), float(high)),
                words=float(np.median([len(record.text.split()) for record in own])),
            )
        )
    return stats


def common_captions(records: Sequence[Record], number: int) -> list[tuple[str, int]]:
    """The most frequent sentences and how many records have them."""
    return Counter(record.text for record in records).most_common(number)


def shared_subjects(records: Sequence[Record]) -> dict[tuple[str, str], int]:
    """How many subjects two splits share, for each pair of splits that shares any: a test on them is not a fair one."""
    subjects = {split: {record.subject for record in records if record.split == split} for split in SPLITS}
    pairs = [(a, b) for i, a in enumerate(SPLITS) for b in SPLITS[i + 1 :]]
    return {(a, b): number for a, b in pairs if (number := len(subjects[a] & subjects[b]))}


def _area(path: Path) -> float:
    return float(read_mask(path).mean())
