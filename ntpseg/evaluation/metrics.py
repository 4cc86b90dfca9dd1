"""Overlap and surface metrics of binary masks, case by case.

Overlap and surface distances come from MONAI. What an empty mask scores is fixed here, because libraries return NaN or
infinity there and averages that drop such cases flatter a model that misses small structures:

=================  ====  ===  ========  ========
prediction, truth  Dice  IoU  HD95      ASSD
=================  ====  ===  ========  ========
both empty         1     1    0         0
one empty          0     0    diagonal  diagonal
=================  ====  ===  ========  ========
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

METRICS = ("dice", "iou", "hd95", "assd")
COUNTS = ("intersection", "predicted", "true")


def _masks(value: np.ndarray | Tensor, name: str) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [N, H, W]")
    if tensor.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be bool")
    return tensor.cpu()


def segmentation_metrics(prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor) -> dict[str, np.ndarray]:
    """Score every prediction against its truth.

    Args:
        prediction: ``[N, H, W]`` bool.
        truth: ``[N, H, W]`` bool.

    Returns:
        Arrays of length N. ``dice`` and ``iou`` in [0, 1]; ``hd95`` (the larger of the two directed 95th percentiles of
        the distance between mask edges) and ``assd`` (the mean over both masks' edge pixels of the distance to the
        other mask's edge) float64 in pixels; ``intersection``, ``predicted``, ``true`` int64 pixel counts, from which
        `summarise` pools.

    Raises:
        ValueError: if a shape or dtype is wrong.
    """
    pred, real = _masks(prediction, "prediction"), _masks(truth, "truth")
    if pred.shape != real.shape:
        raise ValueError(f"prediction has shape {tuple(pred.shape)}; it must be that of truth, {tuple(real.shape)}")
    from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance, compute_iou

    count, height, width = pred.shape
    out: dict[str, np.ndarray] = {
        "intersection": (pred & real).sum(dim=(1, 2)).numpy(),
        "predicted": pred.sum(dim=(1, 2)).numpy(),
        "true": real.sum(dim=(1, 2)).numpy(),
        "dice": np.ones(count),
        "iou": np.ones(count),
        "hd95": np.zeros(count),
        "assd": np.zeros(count),
    }
    one_empty = (out["predicted"] == 0) != (out["true"] == 0)
    out["dice"][one_empty] = out["iou"][one_empty] = 0.0
    out["hd95"][one_empty] = out["assd"][one_empty] = float(np.hypot(height, width))
    filled = np.flatnonzero((out["predicted"] > 0) & (out["true"] > 0))
    if not len(filled):
        return out
    p, t = (x[filled][:, None].float() for x in (pred, real))
    with warnings.catch_warnings():
        # MONAI 1.6 calls its own deprecated argument.
        warnings.simplefilter("ignore", FutureWarning)
        out["dice"][filled] = compute_dice(p, t, include_background=True).flatten().numpy()
        out["iou"][filled] = compute_iou(p, t, include_background=True).flatten().numpy()
        hausdorff = compute_hausdorff_distance(p, t, include_background=True, percentile=95)
        surface = compute_average_surface_distance(p, t, include_background=True, symmetric=True)
    out["hd95"][filled] = hausdorff.flatten().numpy()
    out["assd"][filled] = surface.flatten().numpy()
    return out


def dice_scores(prediction: np.ndarray | Tensor, truth: np.ndarray | Tensor) -> np.ndarray:
    """The Dice of `segmentation_metrics` alone (float64 ``[N]``), without the cost of surface distances."""
    pred, real = _masks(prediction, "prediction"), _masks(truth, "truth")
    total = pred.sum(dim=(1, 2)) + real.sum(dim=(1, 2))
    overlap = 2.0 * (pred & real).sum(dim=(1, 2)).double()
    return torch.where(total > 0, overlap / total.clamp(min=1), torch.ones_like(overlap)).numpy()


def concatenate(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join results of images of different sizes, in order."""
    if not parts:
        return {name: np.zeros(0, dtype=np.int64 if name in COUNTS else np.float64) for name in (*METRICS, *COUNTS)}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
