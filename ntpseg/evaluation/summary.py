"""From per-case metrics to the figures that are reported: means, pooled scores, intervals, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntpseg.evaluation.metrics import METRICS


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: whole subjects are drawn with replacement, so images of one patient stay together."""

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples is {self.resamples}; it must be at least 1")
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level is {self.level}; it must lie strictly between 0 and 1")


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
        mean of the cases' scores; the pooled one, for Dice and IoU, is the score of all pixels of all cases taken
        together (``2 sum|P & T| / sum(|P| + |T|)``).

    Raises:
        ValueError: if there is no case or the lengths differ.
    """
    options = bootstrap or Bootstrap()
    count = len(per_case["dice"])
    if count == 0:
        raise ValueError("per_case holds 0 cases; it must hold at least 1")
    if len(subjects) != count:
        raise ValueError(f"subjects has length {len(subjects)}; it must be the number of cases, {count}")
    _, member = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
    groups = int(member.max()) + 1
    rng = np.random.default_rng(options.seed)
    draws = rng.multinomial(groups, np.full(groups, 1.0 / groups), size=options.resamples).astype(np.float64)

    def per_subject(values: np.ndarray) -> np.ndarray:
        return np.bincount(member, weights=np.asarray(values, dtype=np.float64), minlength=groups)

    def estimate(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, Any]:
        return _estimate(per_subject(numerator), per_subject(denominator), draws, options.level)

    ones = np.ones(count)
    overlap = np.asarray(per_case["intersection"], dtype=np.float64)
    total = np.asarray(per_case["predicted"], dtype=np.float64) + per_case["true"]
    return {
        "cases": count,
        "subjects": groups,
        "level": options.level,
        "per_image": {name: estimate(per_case[name], ones) for name in METRICS if name in per_case},
        "pooled": {"dice": estimate(2.0 * overlap, total), "iou": estimate(overlap, total - overlap)},
    }


def summarise_groups(
    per_case: Mapping[str, np.ndarray],
    subjects: Sequence[str],
    groups: Sequence[str],
    bootstrap: Bootstrap | None = None,
) -> dict[str, dict[str, Any]]:
    """`summarise` for the cases of each group (a structure, a caption), the largest group first, then by name."""
    if len(groups) != len(subjects):
        raise ValueError(f"groups has length {len(groups)}; it must be the number of cases, {len(subjects)}")
    names, member, sizes = np.unique(np.asarray(groups, dtype=str), return_inverse=True, return_counts=True)
    who = np.asarray(subjects, dtype=str)
    result = {}
    for index in np.lexsort((names, -sizes)):
        chosen = member == index
        part = {name: np.asarray(values)[chosen] for name, values in per_case.items()}
        result[str(names[index])] = summarise(part, who[chosen].tolist(), bootstrap)
    return result
