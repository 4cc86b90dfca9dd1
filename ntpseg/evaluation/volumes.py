"""Scores of whole volumes: the slices of a volume that a data set has, put together again.

A structure's slices are those that have a row for it. Slices without one are unknown and belong to neither mask: what a
model would find in them counts nowhere. Of every second or third slice, the others are not missing: the slices are
taken for that much thicker. Elsewhere a missing slice between two others is empty in both masks, and the faces beside
it are surface of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntpseg.evaluation.metrics import METRICS, MillimetreMetric, surface_distances
from ntpseg.evaluation.summary import Bootstrap, mean_estimate

if TYPE_CHECKING:
    from ntpseg.data import Record

CONVENTION = (
    "A structure's slices are those with a row for it; slices without one are unknown and count in neither mask. Both "
    "masks empty: Dice and IoU 1, distances 0; one empty: Dice and IoU 0, distances the diagonal of its slices"
)
VOLUME_ERROR = MillimetreMetric("volume_error_ml", "Volume error", "ml", 2)


def volume_metrics() -> dict[str, MillimetreMetric]:
    """Name, label, unit and digits of each score of a volume."""
    overlaps = [MillimetreMetric(m.name, m.label, "", m.digits, m.name) for m in METRICS.values() if m.pooled]
    of_distances = [m for m in METRICS.values() if m.of_distances is not None]
    distances = [MillimetreMetric(f"{m.name}_mm", m.label, "mm", m.digits, m.name) for m in of_distances]
    return {metric.name: metric for metric in (*overlaps, *distances, VOLUME_ERROR)}


@dataclass(frozen=True)
class VolumeScore:
    """A structure of a volume.

    Attributes:
        volume: as of `ntpseg.data.SlicePlace`.
        structure: the structure; where the data set does not name it, the sentence.
        text: the sentence; "" where the slices have different ones.
        subject: whose volume it is.
        axis: along which it is sliced.
        slices: how many slices were scored.
        missing: how many between the first and the last of them have no row for the structure.
        step: distance of the slices in numbers of slices, 1 where neighbours are.
        voxel_mm: millimetres between slices (those that were scored), rows and columns; None where any is unknown.
        intersection, predicted, true: voxels of both masks, of the prediction, of the truth.
        scores: by the names of `volume_metrics`; those in millimetres and millilitres only where they are known.
            ``volume_error_ml`` is absolute.
    """

    volume: str
    structure: str
    text: str
    subject: str
    axis: str
    slices: int
    missing: int
    step: int
    voxel_mm: tuple[float, float, float] | None
    intersection: int
    predicted: int
    true: int
    scores: dict[str, float]

    @property
    def voxel_ml(self) -> float | None:
        """Millilitres of a voxel."""
        return None if self.voxel_mm is None else math.prod(self.voxel_mm) / 1000


def score_volumes(
    records: Sequence[Record],
    predictions: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    progress: Callable[[str, int, int], None] | None = None,
) -> list[VolumeScore]:
    """Score each structure of each volume; one at a time is in memory besides the slices.

    Args:
        records: N cases; those without a volume are passed over.
        predictions, truths: N masks, bool ``[H, W]``.
        progress: called as ``progress("scoring volumes", done, total)``.

    Returns:
        A score for each volume and structure, in the order of their first slices.

    Raises:
        ValueError: slices of a volume have different sizes.
    """
    groups = list(_groups(records))
    scores = []
    for done, (structure, indices) in enumerate(groups, start=1):
        scores.append(_score(structure, [(records[i], predictions[i], truths[i]) for i in indices]))
        if progress is not None:
            progress("scoring volumes", done, len(groups))
    return scores


def volume_scores(
    prediction: np.ndarray, truth: np.ndarray, voxel_mm: tuple[float, float, float] | None = None
) -> dict[str, float]:
    """Score a volume's mask.

    Args:
        prediction, truth: bool ``[D, H, W]``.
        voxel_mm: millimetres between slices, rows and columns; None: distances and volumes are left out.

    Returns:
        ``dice`` and ``iou``; with `voxel_mm` also ``hd95_mm`` and ``assd_mm`` (as of `segmentation_metrics`, between
        the surfaces: voxels with a face to the outside) and ``volume_error_ml``.

    Raises:
        ValueError: the shapes differ or are not three-dimensional.
    """
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            f"prediction must have the shape [D, H, W] of truth, {list(truth.shape)}, got {list(prediction.shape)}"
        )
    counts = {
        "intersection": np.array([np.count_nonzero(prediction & truth)], np.float64),
        "predicted": np.array([np.count_nonzero(prediction)], np.float64),
        "true": np.array([np.count_nonzero(truth)], np.float64),
    }
    sizes = float(counts["predicted"][0]), float(counts["true"][0])
    scores: dict[str, float] = {}
    for metric in METRICS.values():
        if metric.pooled is not None:
            above, below = (float(value[0]) for value in metric.pooled(counts))
            scores[metric.name] = above / below if below else metric.both_empty
    if voxel_mm is None:
        return scores
    distances = surface_distances(*_tensors(prediction, truth), voxel_mm) if all(sizes) else None
    for metric in METRICS.values():
        if metric.of_distances is None:
            continue
        if distances is not None:
            value = metric.of_distances(distances)
        else:
            diagonal = math.hypot(*(size * mm for size, mm in zip(truth.shape, voxel_mm, strict=True)))
            value = diagonal if any(sizes) else metric.both_empty
        scores[f"{metric.name}_mm"] = value
    scores[VOLUME_ERROR.name] = abs(sizes[0] - sizes[1]) * math.prod(voxel_mm) / 1000
    return scores


def summarise_volumes(scores: Sequence[VolumeScore], bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """Means over volumes, each with its bootstrap interval over subjects.

    Returns:
        ``{"cases", "volumes", "subjects", "slices", "missing", "convention", "per_volume": {metric: estimate},
        "structures": {structure: {"cases", "per_volume"}}}``; an estimate is as of `mean_estimate`, and there is none
        of millimetres where no volume's are known.
    """
    structures: dict[str, list[VolumeScore]] = {}
    for score in scores:
        structures.setdefault(score.structure, []).append(score)
    ordered = sorted(structures, key=lambda name: (-len(structures[name]), name))
    return {
        "cases": len(scores),
        "volumes": len({score.volume for score in scores}),
        "subjects": len({score.subject for score in scores}),
        "slices": sum(score.slices for score in scores),
        "missing": sum(score.missing for score in scores),
        "convention": CONVENTION,
        "per_volume": _means(scores, bootstrap),
        "structures": {
            name: {"cases": len(structures[name]), "per_volume": _means(structures[name], bootstrap)}
            for name in ordered
        },
    }


def _means(scores: Sequence[VolumeScore], bootstrap: Bootstrap | None) -> dict[str, Any]:
    subjects = [score.subject for score in scores]
    found = {}
    for name in volume_metrics():
        values = np.array([score.scores.get(name, np.nan) for score in scores])
        if np.isfinite(values).any():
            found[name] = mean_estimate(values, subjects, bootstrap)
    return found


def _groups(records: Sequence[Record]) -> Iterator[tuple[str, list[int]]]:
    """The structures of each volume, and the records of their slices in order.

    Where a slice has two sentences for a structure, each sentence is a group of its own.
    """
    structures: dict[tuple[str, str], list[int]] = {}
    for i, record in enumerate(records):
        if record.place is not None and record.place.volume:
            structures.setdefault((record.place.volume, record.place.structure or record.text), []).append(i)
    for (_, structure), indices in structures.items():
        parts = {"": indices}
        if len({_index(records[i]) for i in indices}) < len(indices):
            parts = {}
            for i in indices:
                parts.setdefault(records[i].text, []).append(i)
        for part in parts.values():
            yield structure, sorted(part, key=lambda i: _index(records[i]))


def _index(record: Record) -> int:
    assert record.place is not None
    return record.place.index


def _score(structure: str, slices: list[tuple[Record, np.ndarray, np.ndarray]]) -> VolumeScore:
    first = slices[0][0]
    place = first.place
    assert place is not None
    places = [_index(record) for record, _, _ in slices]
    step = math.gcd(*np.diff(places).tolist()) if len(places) > 1 else 1
    depth = (places[-1] - places[0]) // step + 1
    shape = slices[0][2].shape
    prediction, truth = np.zeros((2, depth, *shape), bool)
    for record, mask, true in slices:
        if true.shape != shape:
            raise ValueError(
                f"slices of volume {place.volume!r} must have one size, got {list(shape)} and {list(true.shape)} in "
                f"slices {places[0]} and {_index(record)}"
            )
        at = (_index(record) - places[0]) // step
        prediction[at], truth[at] = mask, true
    voxel_mm = place.voxel_mm
    if voxel_mm is not None:
        voxel_mm = (voxel_mm[0] * step, *voxel_mm[1:])
    texts = {record.text for record, _, _ in slices}
    return VolumeScore(
        volume=place.volume,
        structure=structure,
        text=first.text if len(texts) == 1 else "",
        subject=first.subject,
        axis=place.axis,
        slices=len(slices),
        missing=depth - len(slices),
        step=step,
        voxel_mm=voxel_mm,
        intersection=int(np.count_nonzero(prediction & truth)),
        predicted=int(np.count_nonzero(prediction)),
        true=int(np.count_nonzero(truth)),
        scores=volume_scores(prediction, truth, voxel_mm),
    )


def _tensors(prediction: np.ndarray, truth: np.ndarray) -> tuple[Any, Any]:
    """Both masks as bool ``[D, H, W]``, cut to what either covers: the surfaces are the same."""
    import torch

    either = prediction | truth
    box = tuple(
        slice(int(found[0]), int(found[-1]) + 1)
        for axis in range(3)
        if len(found := np.flatnonzero(either.any(axis=tuple(a for a in range(3) if a != axis))))
    )
    return (
        torch.from_numpy(np.ascontiguousarray(prediction[box])),
        torch.from_numpy(np.ascontiguousarray(truth[box])),
    )
