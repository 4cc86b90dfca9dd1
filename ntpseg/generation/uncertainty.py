"""How unsure a mask is: entropy of each pixel, and how much sampled masks differ."""

from __future__ import annotations

import numpy as np


def pixel_entropy(probability: np.ndarray) -> np.ndarray:
    """Entropy in bits of foreground against background, float32 in [0, 1]: 0 where a pixel is sure, 1 at 0.5."""
    p = np.asarray(probability, np.float64)
    both = [q * np.log2(q, where=q > 0, out=np.zeros_like(q)) for q in (p, 1 - p)]
    return np.clip(-(both[0] + both[1]), 0, 1).astype(np.float32)


def pairwise_dice(masks: np.ndarray) -> float:
    """Mean Dice over the n (n - 1) / 2 pairs of masks; 1 where all are equal, two empty ones included.

    Args:
        masks: bool ``[n, ...]``, n >= 2.

    Raises:
        ValueError: fewer than two masks.
    """
    if len(masks) < 2:
        raise ValueError(f"masks must be at least two, got {len(masks)}")
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    shared, areas = flat @ flat.T, flat.sum(1)
    first, second = np.triu_indices(len(masks), 1)
    whole = areas[first] + areas[second]
    dice = np.where(whole == 0, 1.0, 2 * shared[first, second] / np.maximum(whole, 1))
    return float(dice.mean())
