"""One patient, one split: what the tables state of patients, what names of cases suggest, and what files show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path

from ntpseg.data import problems
from ntpseg.data.layouts.base import Listing
from ntpseg.data.problems import Problem
from ntpseg.data.records import SPLITS, Record
from ntpseg.utils.files import file_identity


def separate_patients(listing: Listing) -> None:
    """Take the pairs of a patient whom the tables state in several splits out of all but the last; in place.

    A problem for each such split says so. The test split is never cut: without the bad pairs (``--skip-bad``) it is the
    data set's own, and nobody in it has been trained on.
    """
    splits = _splits(record for record in listing.records if record.subject in listing.patients)
    shared = {subject: counts for subject, counts in splits.items() if len(counts) > 1}
    kept = {subject: max(counts, key=SPLITS.index) for subject, counts in shared.items()}
    for subject, counts in shared.items():
        last = kept[subject]
        for split in (split for split in SPLITS if split in counts and split != last):
            pairs = f"{counts[split]} of its pairs {'is' if counts[split] == 1 else 'are'} in {split}, {counts[last]}"
            listing.report(
                problems.SHARED_PATIENT, split, subject, f"{pairs} in {last}; put all of a patient into one split"
            )
    listing.records = [record for record in listing.records if kept.get(record.subject, record.split) == record.split]


def separate_images(listing: Listing) -> None:
    """Take the pairs of an image file that is in several splits out of all but the last; in place.

    A problem for each such image and split says so, whatever subjects the tables state. A file under two names, as a
    link, is one. Of a packed set the files are not opened: they were looked at when it was packed.
    """
    from ntpseg.data.shards.files import PackedFile

    if len({record.split for record in listing.records}) < 2:
        return
    files: dict[Path, Hashable] = {}
    splits: dict[Hashable, Counter[str]] = {}
    last: dict[Hashable, Record] = {}
    for record in listing.records:
        if isinstance(record.image, PackedFile):
            continue
        if record.image not in files:
            files[record.image] = file_identity(record.image) or record.image
        file = files[record.image]
        splits.setdefault(file, Counter())[record.split] += 1
        if file not in last or SPLITS.index(record.split) > SPLITS.index(last[file].split):
            last[file] = record
    kept = []
    reported: set[tuple[Hashable, str]] = set()
    for record in listing.records:
        file = files.get(record.image)
        if file is None or last[file].split == record.split:
            kept.append(record)
        elif (file, record.split) not in reported:
            reported.add((file, record.split))
            number, other = splits[file][record.split], last[file]
            pairs = f"{number} of its pairs {'is' if number == 1 else 'are'} in {record.split}"
            alias = "" if other.image == record.image else f" as {listing.short(other.image)}"
            listing.report(
                problems.SHARED_IMAGE,
                record.split,
                record.image,
                f"{pairs}, {splits[file][other.split]} in {other.split}{alias}; put all of an image into one split",
            )
    listing.records = kept


def subjects_in_two_splits(records: Iterable[Record]) -> dict[tuple[str, str], list[str]]:
    """The subjects that two splits share, for each pair of splits that shares any: a test on them is biased."""
    found: dict[tuple[str, str], list[str]] = {}
    for subject, counts in _splits(records).items():
        own = [split for split in SPLITS if split in counts]
        for pair in ((a, b) for i, a in enumerate(own) for b in own[i + 1 :]):
            found.setdefault(pair, []).append(subject)
    return {pair: found[pair] for pair in sorted(found, key=lambda pair: [SPLITS.index(split) for split in pair])}


def patient_notes(records: Iterable[Record]) -> list[Problem]:
    """A note for each two splits that share subjects, of whom only the names of cases tell."""
    return [
        Problem(
            problems.SHARED_PATIENT,
            first,
            subjects[0] if len(subjects) == 1 else f"{subjects[0]}, ...",
            f"by the names of cases, {len(subjects)} subject{'s are' if len(subjects) > 1 else ' is'} in {first} and "
            f"in {second}; a column subject decides",
        )
        for (first, second), subjects in subjects_in_two_splits(records).items()
    ]


def _splits(records: Iterable[Record]) -> dict[str, Counter[str]]:
    """Of each subject, its pairs in each split."""
    splits: dict[str, Counter[str]] = {}
    for record in records:
        splits.setdefault(record.subject, Counter())[record.split] += 1
    return splits
