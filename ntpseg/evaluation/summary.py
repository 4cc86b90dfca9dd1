"""From per-case metrics to the figures that are reported: means, pooled scores, intervals, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntpseg.evaluation.metrics import COUNTS, METRICS, mm_metrics
from ntpseg.utils.checks import check_integer, check_number


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are computed: whole subjects are drawn with replacement, so images of one patient stay together.

    Attributes:
        resamples: number of draws.
        level: of the interval, in (0, 1).
        seed: of the draws.

    Raises:
        ValueError: `resamples` is below 1, or `level` is not within (0, 1).
    """

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("resamples", self.resamples, 1)
        check_number("level", self.level, above=0, below=1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide; 0 / 0, where neither prediction nor truth holds a pixel, is a perfect score."""
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, 1.0, numerator / safe)


def _estimate(numerator: np.ndarray, denominator: np.ndarray, draws: np.ndarray, level: float) -> dict[str, Any]:
    value = float(_ratio(numerator.sum(), denominator.sum()))
    if draws.shape[1] < 2:
        # One subject says nothing about the spread between subjects.
        return {"value": value, "low": None, "high": None}
    sampled = _ratio(draws @ numerator, draws @ denominator)
    tail = 100.0 * (1.0 - level) / 2.0
    low, high = np.percentile(sampled, [tail, 100.0 - tail])
    return {"value": value, "low": float(low), "high": float(high)}


def summarise(
    per_case: Mapping[str, np.ndarray], subjects: Sequence[str], bootstrap: Bootstrap | None = None
) -> dict[str, Any]:
    """Average over images and pool over pixels, each with its bootstrap interval over subjects.

    Args:
        per_case: what `segmentation_metrics` returned, N cases.
        subjects: the subject of each case, length N.
        bootstrap: resampling options.

    Returns:
        ``{"cases": N, "subjects": S, "level": ..., "per_image": {metric: estimate}, "pooled": {...}}``; an estimate
        is ``{"value", "low", "high"}``; the bounds are None with fewer than two subjects. The per-image figure is the
        mean of the cases' scores (where millimetres are known, ``millimetres`` has the same of `mm_metrics`, each with
        the number of its ``cases``); the pooled one, for Dice and IoU, is the score of all pixels of all cases
        together (``2 sum|P & T| / sum(|P| + |T|)``).

    Raises:
        ValueError: if there is no case or the lengths differ.
    """
    options = bootstrap or Bootstrap()
    count = len(per_case["dice"])
    if count == 0:
        raise ValueError("per_case must hold at least 1 case, got 0 cases")
    if len(subjects) != count:
        raise ValueError(f"subjects must have the length of the cases, {count}, got {len(subjects)}")
    _, subject_index = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
    num_subjects = int(subject_index.max()) + 1
    rng = np.random.default_rng(options.seed)
    draws = rng.multinomial(num_subjects, np.full(num_subjects, 1.0 / num_subjects), size=options.resamples).astype(
        np.float64
    )

    def per_subject(values: np.ndarray) -> np.ndarray:
        return np.bincount(subject_index, weights=np.asarray(values, dtype=np.float64), minlength=num_subjects)

    def estimate(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, Any]:
        return _estimate(per_subject(numerator), per_subject(denominator), draws, options.level)

    ones = np.ones(count)
    counts = {name: np.asarray(per_case[name], dtype=np.float64) for name in COUNTS}
    return {
        "cases": count,
        "subjects": num_subjects,
        "level": options.level,
        "per_image": {name: estimate(per_case[name], ones) for name in METRICS if name in per_case},
        **_millimetres(per_case, subjects, options),
        "pooled": {name: estimate(*m.pooled(counts)) for name, m in METRICS.items() if m.pooled is not None},
    }


def mean_estimate(values: np.ndarray, subjects: Sequence[str], bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """The mean of N scores as ``{"value", "low", "high", "cases"}``, its interval over the subjects.

    Args:
        values: float ``[N]``; NaN where a case has no such score, and does not count.
        subjects: the subject of each case, length N.
        bootstrap: resampling options.

    Raises:
        ValueError: no case has a score, or the lengths differ.
    """
    known = np.isfinite(np.asarray(values, dtype=np.float64))
    chosen = np.asarray(values, dtype=np.float64)[known]
    names = [subject for subject, take in zip(subjects, known, strict=True) if take]
    zeros = np.zeros(len(chosen))
    cases = {"dice": chosen, **{name: zeros for name in COUNTS}}
    return {**summarise(cases, names, bootstrap)["per_image"]["dice"], "cases": len(chosen)}


def summarise_groups(
    per_case: Mapping[str, np.ndarray],
    subjects: Sequence[str],
    groups: Sequence[str],
    bootstrap: Bootstrap | None = None,
) -> dict[str, dict[str, Any]]:
    """`summarise` for the cases of each group (a structure, a caption), the largest group first, then by name."""
    if len(groups) != len(subjects):
        raise ValueError(f"groups must have the length of the cases, {len(subjects)}, got {len(groups)}")
    names, group_index, sizes = np.unique(np.asarray(groups, dtype=str), return_inverse=True, return_counts=True)
    subject_of_case = np.asarray(subjects, dtype=str)
    result = {}
    for index in np.lexsort((names, -sizes)):
        chosen = group_index == index
        part = {name: np.asarray(values)[chosen] for name, values in per_case.items()}
        result[str(names[index])] = summarise(part, subject_of_case[chosen].tolist(), bootstrap)
    return result


def _millimetres(
    per_case: Mapping[str, np.ndarray], subjects: Sequence[str], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    names = [name for name in mm_metrics() if name in per_case and np.isfinite(per_case[name]).any()]
    found = {name: mean_estimate(per_case[name], subjects, bootstrap) for name in names}
    return {"millimetres": found} if found else {}


# How cases without a finding enter every average of Dice.
CONVENTION = (
    "Dice of a case without a finding: 1 where nothing is predicted, 0 where anything is; all cases are in the averages"
)


def summarise_findings(
    per_case: Mapping[str, np.ndarray],
    pixels: np.ndarray,
    subjects: Sequence[str],
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """The cases with a finding and those without (an empty true mask), each as a group of its own.

    Args:
        per_case: what `segmentation_metrics` returned, N cases.
        pixels: of each case's image, int64 ``[N]``.
        subjects: the subject of each case, length N.
        bootstrap: resampling options.

    Returns:
        ``{"convention": ..., "with": ..., "without": ...}``; a group without cases is None. ``with`` is what
        `summarise` returns, and ``missed``, the number of cases in which nothing was predicted. ``without`` has
        ``cases``, ``false_positives`` (cases in which anything was predicted), and as estimates ``specificity`` (share
        of the cases in which nothing was) and ``false_positive_area`` (mean share of the image that was predicted).
    """
    options = bootstrap or Bootstrap()
    positive = np.asarray(per_case["true"]) > 0
    predicted = np.asarray(per_case["predicted"])
    result: dict[str, Any] = {"convention": CONVENTION, "with": None, "without": None}
    if positive.any():
        chosen, names = _chosen(per_case, subjects, positive)
        missed = int((predicted[positive] == 0).sum())
        result["with"] = {**summarise(chosen, names, options), "missed": missed}
    if not positive.all():
        chosen, names = _chosen(per_case, subjects, ~positive)
        # Averages of the cases: `summarise` takes any score under the name of one.
        empty = (predicted[~positive] == 0).astype(np.float64)
        area = predicted[~positive] / pixels[~positive]
        result["without"] = {
            "cases": int((~positive).sum()),
            "false_positives": int((empty == 0).sum()),
            "specificity": summarise({**chosen, "dice": empty}, names, options)["per_image"]["dice"],
            "false_positive_area": summarise({**chosen, "dice": area}, names, options)["per_image"]["dice"],
        }
    return result


def _chosen(
    per_case: Mapping[str, np.ndarray], subjects: Sequence[str], chosen: np.ndarray
) -> tuple[dict[str, np.ndarray], list[str]]:
    part = {name: np.asarray(values)[chosen] for name, values in per_case.items()}
    return part, [subject for subject, take in zip(subjects, chosen, strict=True) if take]
