"""One patient, one split: what the tables state of patients, and what only names of cases suggest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ntpseg.data import problems
from ntpseg.data.layouts.base import Listing
from ntpseg.data.problems import Problem
from ntpseg.data.records import SPLITS, Record


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
