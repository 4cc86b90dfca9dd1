"""Masks drawn over their image."""

from __future__ import annotations

import numpy as np

# Bright and cold, since images are grey, or (CT windows as colours) red to yellow.
PREDICTION = (0, 200, 255)
TRUTH = (90, 240, 90)
# Probabilities whose lines are drawn, and their colours: the surer, the lighter.
LEVELS = ((0.25, (40, 90, 255)), (0.5, PREDICTION), (0.75, (255, 255, 255)))


def outline(mask: np.ndarray) -> np.ndarray:
    """The mask's pixels next to its outside (or to the image's border) along an axis: bool ``[H, W]``."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def draw(
    image: np.ndarray, mask: np.ndarray, color: tuple[int, int, int] = PREDICTION, opacity: float = 0.4
) -> np.ndarray:
    """Tint a mask over an image and draw its outline.

    Args:
        image: uint8 ``[H, W]`` or ``[H, W, 3]``.
        mask: bool ``[H, W]``.
        color: red, green, blue.
        opacity: of the tint, 0 (outline alone) to 1.

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        ValueError: the sizes differ.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask must have the image's size {list(image.shape[:2])}, got {list(mask.shape)}")
    rgb = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image
    out = rgb.astype(np.float32)
    out[mask] = out[mask] * (1 - opacity) + np.asarray(color, np.float32) * opacity
    out[outline(mask)] = color
    return np.rint(out).astype(np.uint8)


def draw_levels(image: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Draw lines of equal foreground probability, `LEVELS`, over an image.

    Args:
        image: uint8 ``[H, W]`` or ``[H, W, 3]``.
        probability: ``[H, W]`` in [0, 1].

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        ValueError: the sizes differ.
    """
    for level, color in LEVELS:
        image = draw(image, probability >= level, color, opacity=0.0)
    return image
