"""Overlap and surface metrics of binary masks, case by case. To add one, write a `Metric` and list it in `METRICS`.

Overlap and surface distances come from MONAI. What an empty mask scores is fixed here, because libraries return NaN or
infinity there and averages that drop such cases flatter a model that misses small structures:

=================  ====  ===  ========  ========
prediction, truth  Dice  IoU  HD95      ASSD
=================  ====  ===  ========  ========
both empty         1     1    0         0
one empty          0     0    diagonal  diagonal
=================  ====  ===  ========  ========

Distances are in pixels, and beside them in millimetres where the distance of rows and of columns is known. A mean is of
one unit alone: `METRICS` are of all cases, `mm_metrics` of those with a known distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ntpseg.utils.checks import check_number

if TYPE_CHECKING:
    from torch import Tensor

# From the edge of the prediction to that of the truth, and back.
SurfaceDistances: TypeAlias = "tuple[Tensor, Tensor]"

# The table above in words, for result files.
EMPTY_MASKS = "Dice and IoU are 1 where truth and prediction are both empty, 0 where one of them is"
# Pixels of both masks, of the prediction and of the truth, from which pooled scores are computed.
COUNTS = ("intersection", "predicted", "true")


@dataclass(frozen=True)
class Metric:
    """One score of a predicted mask; every result file, table and report shows those of `METRICS`.

    Attributes:
        name: key in ``summary.json`` and column of ``cases.csv``.
        label: heading in tables and the report.
        digits: decimals shown.
        compute: scores ``[N, 1]`` of float predictions and truths ``[N, 1, H, W]``, none of them empty; None for a
            score of distances.
        both_empty: the score where neither mask holds a pixel.
        one_empty: the score where exactly one mask does, of an image's height and width.
        pooled: numerator and denominator, per case, of the score of all pixels of all cases together, from `COUNTS`;
            None where there is no such score.
        unit: of the score, such as "px".
        in_captions: shown below each example of the report.
        of_distances: the score of one case's two `SurfaceDistances`, in their unit; None for scores that are no
            distances.
    """

    name: str
    label: str
    digits: int
    compute: Callable[[Tensor, Tensor], Tensor] | None
    both_empty: float
    one_empty: Callable[[int, int], float]
    pooled: Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, np.ndarray]] | None = None
    unit: str = ""
    in_captions: bool = True
    of_distances: Callable[[SurfaceDistances], float] | None = None

    @property
    def heading(self) -> str:
        """Label and unit, such as ``HD95 (px)``."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def caption(self, score: float) -> str:
        """Label, score and unit, such as ``HD95 3.21 px``."""
        return f"{self.label} {score:.{self.digits}f}{' ' if self.unit else ''}{self.unit}"


def _dice(prediction: Tensor, truth: Tensor) -> Tensor:
    from monai.metrics import compute_dice

    return compute_dice(prediction, truth, include_background=True)


def _iou(prediction: Tensor, truth: Tensor) -> Tensor:
    from monai.metrics import compute_iou

    return compute_iou(prediction, truth, include_background=True)


def surface_distances(prediction: Tensor, truth: Tensor, spacing: Sequence[float] | None = None) -> SurfaceDistances:
    """Distances from each edge element of a mask to the nearest of the other mask's, computed once for all metrics.

    Args:
        prediction: ``[H, W]`` or ``[D, H, W]``, 1 in the mask and 0 outside; not empty.
        truth: the same.
        spacing: between neighbours along each axis; 1 by default.

    Returns:
        Two vectors: from the prediction's edge to the truth's, and back.
    """
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    edges: Any = get_mask_edges(prediction, truth)
    options: Any = {"spacing": None if spacing is None else [float(value) for value in spacing]}
    directed: Any = [get_surface_distance(*pair, **options) for pair in (edges, edges[::-1])]
    return directed[0], directed[1]


def _hd95(distances: SurfaceDistances) -> float:
    return max(float(directed.quantile(0.95)) for directed in distances)


def _assd(distances: SurfaceDistances) -> float:
    forward, backward = distances
    return float(forward.sum() + backward.sum()) / (len(forward) + len(backward))


def _pooled_dice(counts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return 2.0 * counts["intersection"], counts["predicted"] + counts["true"]


def _pooled_iou(counts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return counts["intersection"], counts["predicted"] + counts["true"] - counts["intersection"]


def _zero(height: int, width: int) -> float:
    return 0.0


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("dice", "Dice", 3, _dice, both_empty=1.0, one_empty=_zero, pooled=_pooled_dice),
        # A function of Dice, and ASSD is close to HD95: captions have room for one of each.
        Metric("iou", "IoU", 3, _iou, both_empty=1.0, one_empty=_zero, pooled=_pooled_iou, in_captions=False),
        Metric("hd95", "HD95", 2, None, 0.0, math.hypot, unit="px", of_distances=_hd95),
        Metric("assd", "ASSD", 2, None, 0.0, math.hypot, unit="px", in_captions=False, of_distances=_assd),
    )
}


@dataclass(frozen=True)
class MillimetreMetric:
    """A score of the cases whose millimetres are known.

    Attributes:
        name: key in ``summary.json`` and column of ``cases.csv`` or ``volumes.csv``.
        label, unit, digits, in_captions: as of `Metric`.
        source: the metric of `METRICS` whose distance it is; None for an error of area or volume.
    """

    name: str
    label: str
    unit: str
    digits: int
    source: str | None = None
    in_captions: bool = True

    @property
    def heading(self) -> str:
        """Label and unit, such as ``HD95 (mm)``."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def caption(self, score: float) -> str:
        """Label, score and unit, such as ``HD95 3.21 mm``."""
        return f"{self.label} {score:.{self.digits}f} {self.unit}".rstrip()


AREA_ERROR = MillimetreMetric("area_error_mm2", "Area error", "mm2", 1, in_captions=False)


def mm_metrics() -> dict[str, MillimetreMetric]:
    """The scores in millimetres of a slice: of each distance of `METRICS`, and the absolute error of the area."""
    distances = [
        MillimetreMetric(f"{m.name}_mm", m.label, "mm", m.digits, m.name, m.in_captions)
        for m in METRICS.values()
        if m.of_distances is not None
    ]
    return {metric.name: metric for metric in (*distances, AREA_ERROR)}


def segmentation_metrics(
    prediction: np.ndarray | Tensor,
    truth: np.ndarray | Tensor,
    pixel_mm: tuple[float, float] | None = None,
) -> dict[str, np.ndarray]:
    """Score every prediction against its truth.

    Args:
        prediction: ``[N, H, W]`` bool.
        truth: ``[N, H, W]`` bool.
        pixel_mm: millimetres between rows and between columns, of all N; None where they are unknown.

    Returns:
        Arrays of length N. One float64 array for each of `METRICS`: ``dice`` and ``iou`` in [0, 1]; ``hd95`` (the
        larger of the two directed 95th percentiles of the distance between mask edges) and ``assd`` (the mean over both
        masks' edge pixels of the distance to the other mask's edge) in pixels. One int64 array of pixels for each of
        `COUNTS`, from which `summarise` pools. With `pixel_mm` also one float64 array for each of `mm_metrics`:
        ``hd95_mm`` and ``assd_mm`` in millimetres, and ``area_error_mm2``, the absolute difference of the areas.

    Raises:
        ValueError: if a shape or dtype is wrong.
    """
    pred, real = _pair(prediction, truth)
    height, width = pred.shape[1:]
    if pixel_mm is not None:
        for name, value in zip(("row", "column"), pixel_mm, strict=True):
            check_number(f"pixel_mm of a {name}", value, above=0)
    counts = {
        "intersection": (pred & real).sum(dim=(1, 2)).numpy(),
        "predicted": pred.sum(dim=(1, 2)).numpy(),
        "true": real.sum(dim=(1, 2)).numpy(),
    }
    one_empty = (counts["predicted"] == 0) != (counts["true"] == 0)
    filled = np.flatnonzero((counts["predicted"] > 0) & (counts["true"] > 0))
    p, t = (x[filled][:, None].float() for x in (pred, real))
    distances = [surface_distances(*pair) for pair in zip(p[:, 0], t[:, 0], strict=True)]
    scores = {}
    for metric in METRICS.values():
        values = np.full(len(pred), metric.both_empty)
        values[one_empty] = metric.one_empty(height, width)
        if metric.of_distances is not None:
            values[filled] = [metric.of_distances(of_case) for of_case in distances]
        elif metric.compute is not None and len(filled):
            values[filled] = metric.compute(p, t).flatten().numpy()
        scores[metric.name] = values
    if pixel_mm is not None:
        scores |= _in_mm(p, t, filled, one_empty, scores, (height, width), pixel_mm)
        area = np.abs(counts["predicted"] - counts["true"]) * (pixel_mm[0] * pixel_mm[1])
        scores[AREA_ERROR.name] = area.astype(np.float64)
    return {**counts, **scores}


def _in_mm(
    prediction: Tensor,
    truth: Tensor,
    filled: np.ndarray,
    one_empty: np.ndarray,
    scores: Mapping[str, np.ndarray],
    size: tuple[int, int],
    pixel_mm: tuple[float, float],
) -> dict[str, np.ndarray]:
    """The distances of `METRICS` in millimetres, given those in pixels and the masks that are not empty."""
    found = {}
    distances: list[SurfaceDistances] | None = None
    for metric in METRICS.values():
        if metric.of_distances is None:
            continue
        if pixel_mm[0] == pixel_mm[1]:
            found[f"{metric.name}_mm"] = scores[metric.name] * pixel_mm[0]
            continue
        if distances is None:
            distances = [surface_distances(*pair, pixel_mm) for pair in zip(prediction[:, 0], truth[:, 0], strict=True)]
        values = np.full(len(one_empty), metric.both_empty)
        values[one_empty] = math.hypot(size[0] * pixel_mm[0], size[1] * pixel_mm[1])
        values[filled] = [metric.of_distances(of_case) for of_case in distances]
        found[f"{metric.name}_mm"] = values
    return found


def dice_scores(prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor) -> np.ndarray:
    """The Dice of `segmentation_metrics` alone (float64 ``[N]``), without the cost of surface distances.

    Raises:
        ValueError: if a shape or dtype is wrong.
    """
    pred, real = (masks.numpy() for masks in _pair(prediction, truth))
    total = pred.sum(axis=(1, 2)) + real.sum(axis=(1, 2))
    overlap = 2.0 * (pred & real).sum(axis=(1, 2))
    return np.where(total > 0, overlap / total.clip(min=1), 1.0)


def concatenate(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join results of images of different sizes, in order."""
    if not parts:
        scores = {name: np.zeros(0) for name in METRICS}
        return {**scores, **{name: np.zeros(0, dtype=np.int64) for name in COUNTS}}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _pair(prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    pred, real = _masks(prediction, "prediction"), _masks(truth, "truth")
    if pred.shape != real.shape:  # one image against many would broadcast
        raise ValueError(f"prediction must have the shape of truth, {list(real.shape)}, got {list(pred.shape)}")
    return pred, real


def _masks(value: np.ndarray | Tensor, name: str) -> Tensor:
    import torch

    try:
        tensor = torch.as_tensor(value) if isinstance(value, np.ndarray | torch.Tensor) else None
    except TypeError:  # an array of strings or objects
        tensor = None
    if tensor is None or tensor.ndim != 3 or tensor.dtype != torch.bool or tensor.device.type == "meta":
        given = f"a {type(value).__name__}" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name} must be bool [N, H, W], got {given}")
    return tensor.cpu()
