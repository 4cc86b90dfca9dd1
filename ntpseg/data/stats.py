"""Counts and sizes of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ntpseg.data.checks import map_files
from ntpseg.data.masks import MIN_PIXELS, MaskContent, mask_content
from ntpseg.data.patients import subjects_in_two_splits
from ntpseg.data.records import SPLITS, Record


@dataclass(frozen=True, slots=True)
class SplitStats:
    """The statistics of one split.

    Attributes:
        split: "train", "val" or "test".
        pairs: number of records.
        images: number of different image files (one file under several names counts once).
        subjects: number of subjects.
        captions: number of different sentences.
        unseen: number of these sentences that training does not have.
        negatives: number of records whose mask holds no finding.
        area: 25 %, 50 % and 75 % quantile of the masks' area as a fraction of their image; NaN without a readable mask
            that holds a finding.
        words: median number of words of a sentence.
    """

    split: str
    pairs: int
    images: int
    subjects: int
    captions: int
    unseen: int
    negatives: int
    area: tuple[float, float, float]
    words: float


def mask_contents(records: Sequence[Record]) -> dict[Path, MaskContent | str]:
    """What each record's mask file holds, or why it cannot be read."""
    return map_files(mask_content, (record.mask for record in records if record.mask is not None))


def empty_records(records: Sequence[Record], contents: Mapping[Path, MaskContent | str]) -> list[Record]:
    """The records whose mask holds no finding."""
    return [
        record
        for record in records
        if record.mask is not None and 0 <= _area(contents[record.mask], record.mask_value)[0] < MIN_PIXELS
    ]


def split_stats(
    records: Sequence[Record], contents: Mapping[Path, MaskContent | str] | None = None
) -> list[SplitStats]:
    """Statistics of every split that has records.

    Args:
        records: the data set.
        contents: of its masks, see `mask_contents`; by default every mask is opened. Unreadable ones are left out of
            the areas.
    """
    contents = mask_contents(records) if contents is None else contents
    known = {record.text for record in records if record.split == "train"}
    stats = []
    for split in SPLITS:
        selected = [record for record in records if record.split == split]
        if not selected:
            continue
        texts = {record.text for record in selected}
        areas = [_area(contents[record.mask], record.mask_value) for record in selected if record.mask is not None]
        values = [fraction for pixels, fraction in areas if pixels >= MIN_PIXELS]
        low, middle, high = np.percentile(values, (25, 50, 75)) if values else (np.nan,) * 3
        stats.append(
            SplitStats(
                split=split,
                pairs=len(selected),
                images=len({(stat.st_dev, stat.st_ino) for record in selected if (stat := record.image.stat())}),
                subjects=len({record.subject for record in selected}),
                captions=len(texts),
                unseen=len(texts - known),
                negatives=sum(0 <= pixels < MIN_PIXELS for pixels, _ in areas),
                area=(float(low), float(middle), float(high)),
                words=float(np.median([len(record.text.split()) for record in selected])),
            )
        )
    return stats


def common_captions(records: Sequence[Record], number: int) -> list[tuple[str, int]]:
    """The most frequent sentences and how many records have them."""
    return Counter(record.text for record in records).most_common(number)


def shared_subjects(records: Sequence[Record]) -> dict[tuple[str, str], int]:
    """How many subjects two splits share, for each pair of splits that shares any: a test on them is biased."""
    return {pair: len(subjects) for pair, subjects in subjects_in_two_splits(records).items()}


def _area(content: MaskContent | str, value: str) -> tuple[int, float]:
    """Foreground pixels, -1 where the mask cannot be read, and as a fraction of the image."""
    try:
        pixels = -1 if isinstance(content, str) else content.area(value)
    except ValueError:
        pixels = -1
    return pixels, 0.0 if isinstance(content, str) else pixels / (content.size[0] * content.size[1])
