"""Temperature scaling of pixel probabilities."""

from __future__ import annotations

import numpy as np

# Nearer to 0 or 1 than this a probability counts as this: the log of what is left must be finite.
CLIP = 1e-6


def pixel_logit(probability: np.ndarray) -> np.ndarray:
    """``log(p / (1 - p))`` in float64 of probabilities of any shape, clipped to [`CLIP`, 1 - `CLIP`]."""
    clipped = np.clip(np.asarray(probability, np.float64), CLIP, 1 - CLIP)
    return np.log(clipped) - np.log1p(-clipped)


def calibrate(probability: np.ndarray, temperature: float) -> np.ndarray:
    """``sigmoid(logit(p) / temperature)``: Guo et al., ICML 2017 (arXiv 1706.04599), for two classes.

    0.5 stays 0.5 and the order of pixels stays, so that no mask needs to change. The logit is that of the foreground's
    marginal probability, whatever it was read from: expected patches, a decoded mask, the mean of samples.

    Args:
        probability: in [0, 1], of any shape.
        temperature: above 1 for a model that is too sure; 1 gives `probability` as it is.

    Returns:
        float32 of the same shape.
    """
    if temperature == 1:
        return np.asarray(probability, np.float32)
    return (1 / (1 + np.exp(-pixel_logit(probability) / temperature))).astype(np.float32)
