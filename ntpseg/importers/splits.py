"""Whole subjects to train, val and test, where a source does not say."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ntpseg.data.records import SPLITS
from ntpseg.importers.base import Case
from ntpseg.utils.checks import check_choice


def assign_splits(cases: Sequence[Case], fractions: tuple[float, float, float], seed: int) -> list[str]:
    """The split of every case.

    Subjects of cases without one are dealt out in an order that depends on their names and `seed` alone. A split that
    the source names is its own: the others share what it would have had (a source with a test set keeps it).

    Args:
        cases: of the whole source.
        fractions: of the subjects in train, val and test.
        seed: of the order.

    Raises:
        ValueError: the source has one subject in two splits, or in one and among the cases without.
    """
    fixed: dict[str, str] = {}
    for case in cases:
        if not case.split:
            continue
        check_choice(f"split of {case.name}", case.split, SPLITS)
        if fixed.setdefault(case.subject, case.split) != case.split:
            raise ValueError(
                f"a subject must be in one split, got {case.subject!r} in {fixed[case.subject]} and in {case.split} "
                f"({case.name}); correct the source's lists"
            )
    for case in cases:
        if not case.split and case.subject in fixed:
            raise ValueError(
                f"a subject must be in one split, got {case.subject!r} in {fixed[case.subject]} and among the cases to "
                f"be dealt out ({case.name}); rename one of them, or correct the source's lists"
            )
    free = sorted({case.subject for case in cases} - fixed.keys(), key=lambda name: (_digest(f"{seed}:{name}"), name))
    named = set(fixed.values()) - {"train"}
    shares = [0.0 if split in named else fraction for split, fraction in zip(SPLITS, fractions)]
    total = sum(shares)
    assigned = dict(fixed)
    if total <= 0:
        assigned |= dict.fromkeys(free, "train")
    else:
        # Three subjects fill all three splits; train has what rounding leaves.
        held = [max(round(share / total * len(free)), 1) if share and len(free) > 2 else 0 for share in shares[1:]]
        held[0] = min(held[0], len(free))
        held[1] = min(held[1], len(free) - held[0])
        first_val = len(free) - sum(held)
        for place, subject in enumerate(free):
            late = place - first_val
            assigned[subject] = "train" if late < 0 else "val" if late < held[0] else "test"
    return [assigned[case.subject] for case in cases]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
