"""Losses on the pixels of decoded masks: what Dice measures, which the likelihood of tokens does not see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ntpseg.utils.checks import check_number


@dataclass(frozen=True)
class DenseLossOptions:
    """Weights of the losses on pixels, added to the loss on tokens; 0 switches one off.

    Attributes:
        dice: of `soft_dice_loss` on the expected patches, see `PatchReadout.expected`.
        pixel: of `pixel_loss` on the stem's draft; only with the front ends ``features`` and ``both``.
        soft: of `soft_target_loss`.
        soft_temperature: of its similarity, in pixels of a patch, see `PatchReadout.similarity`.

    Raises:
        ValueError: a weight is negative, or the temperature not above 0.
    """

    dice: float = 0.5
    pixel: float = 1.0
    soft: float = 0.0
    soft_temperature: float = 4.0

    def __post_init__(self) -> None:
        for name in ("dice", "pixel", "soft"):
            check_number(f"dense_loss.{name}", getattr(self, name), 0)
        check_number("dense_loss.soft_temperature", self.soft_temperature, above=0)


def soft_dice_loss(probability: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """``1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s)`` of each image (V-Net, arXiv 1606.04797).

    Per image and not over the batch: small lesions count as much as large ones, as in the per-image score.

    Args:
        probability: ``[B, ...]`` float in [0, 1].
        target: ``[B, ...]`` of the same shape, in [0, 1].
        smooth: s in pixels; keeps the loss of an image without foreground finite.

    Returns:
        ``[B]``.
    """
    p, t = probability.flatten(1), target.flatten(1)
    return 1 - (2 * (p * t).sum(1) + smooth) / (p.sum(1) + t.sum(1) + smooth)


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, averaged over an image's pixels, plus `soft_dice_loss`: ``[B]`` of ``[B, ...]`` logits."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1)
    return entropy + soft_dice_loss(logits.sigmoid(), target)


def to_patches(pixels: Tensor, factor: int) -> Tensor:
    """``[B, cells, factor**2]`` patches, row-major, of pictures ``[B, S, S]``."""
    batch, height, width = pixels.shape
    grid = pixels.reshape(batch, height // factor, factor, width // factor, factor)
    return grid.transpose(2, 3).reshape(batch, -1, factor**2)


def from_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `to_patches`: ``[B, rows * P, columns * P]`` of ``[B, rows * columns, P * P]``."""
    batch, _, pixels = patches.shape
    factor = round(pixels**0.5)
    cells = patches.reshape(batch, *grid, factor, factor).transpose(2, 3)
    return cells.reshape(batch, grid[0] * factor, grid[1] * factor)


def soft_target_loss(logits: Tensor, target: Tensor, similarity: Tensor) -> Tensor:
    """Cross-entropy against a distribution over like codes: ``-sum_v q[y, v] log softmax(z)[v]``, averaged over cells.

    Args:
        logits: ``[B, N, V]``.
        target: ``[B, N]`` int64 codes.
        similarity: ``[V, V]``, row y the distribution q[y] that stands for code y.

    Returns:
        ``[B]``.
    """
    return -(similarity[target] * torch.log_softmax(logits, -1)).sum(-1).mean(1)
