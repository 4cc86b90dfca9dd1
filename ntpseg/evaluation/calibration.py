"""Calibration of pixel probabilities: reliability, expected calibration error, Brier score, and the temperature.

A pixel's probability p is that of the foreground, at the model's size, and is compared with the true mask there.

- Reliability: pixels in `BINS` bins of p, equally wide; of each the mean p and the share of foreground.
- ECE: the mean over bins of |share - mean p|, weighed by their pixels (Naeini et al., AAAI 2015, for two classes; the
  number of bins as in Guo et al., ICML 2017, arXiv 1706.04599).
- Brier score: mean of (p - y)^2 (Brier 1950). NLL: mean of -log of the probability of what is there, in nats.

Most pixels are sure background, which makes the mean over all of them small: each figure is also given over the band
of pixels whose p was within `BAND` before any temperature, the same pixels before and after.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ntpseg.generation.calibration import CLIP, pixel_logit

BINS = 15
BAND = (0.01, 0.99)
TEMPERATURES = (0.1, 10.0)
# Steps of the logit in which pixels are counted: finer than any figure here can tell.
_CELLS = 4096
_LIMIT = float(pixel_logit(np.array(1 - CLIP)))


class PixelCounts:
    """Foreground and background pixels by the logit of their probability; of fixed size, whatever is added.

    Every figure of this module is computed from these counts. Within a step of the logit of 0.007 pixels count with
    their mean, so that the figures are those of the pixels themselves to about 1e-4.
    """

    def __init__(self) -> None:
        self._pixels, self._foreground, self._logits = (np.zeros(_CELLS) for _ in range(3))

    @property
    def pixels(self) -> int:
        """Pixels that were added."""
        return int(self._pixels.sum())

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Count the pixels of one or more masks.

        Args:
            probability: in [0, 1], not calibrated.
            truth: bool of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        if probability.shape != truth.shape:
            raise ValueError(f"truth must have the shape of probability, {probability.shape}, got {truth.shape}")
        logit = pixel_logit(probability).ravel()
        cell = np.minimum(((logit + _LIMIT) * (_CELLS / (2 * _LIMIT))).astype(np.int64), _CELLS - 1)
        self._pixels += np.bincount(cell, minlength=_CELLS)
        self._foreground += np.bincount(cell[truth.ravel()], minlength=_CELLS)
        self._logits += np.bincount(cell, weights=logit, minlength=_CELLS)

    def measures(self, temperature: float = 1.0) -> dict[str, Any]:
        """ECE, Brier score, NLL and the reliability curve at a temperature, for JSON.

        Returns:
            ``{"temperature", "pixels", "ece", "brier", "nll", "bins", "band": {...}}``; the band has the same figures
            of its pixels, or is None where it has none. A bin is ``{"pixels", "confidence", "frequency"}``, with None
            for the means of an empty one.
        """
        pixels, foreground, logit = self._occupied()
        inside = (logit > pixel_logit(np.array(BAND[0]))) & (logit < pixel_logit(np.array(BAND[1])))
        band = _measures(pixels[inside], foreground[inside], logit[inside] / temperature)
        return {"temperature": temperature, **_measures(pixels, foreground, logit / temperature), "band": band or None}

    def fit_temperature(self) -> float:
        """The temperature within `TEMPERATURES` of the least NLL, to four digits; 1 without any pixel.

        The NLL is convex in 1 / temperature, so there is one least value.
        """
        from scipy.optimize import minimize_scalar

        pixels, foreground, logit = self._occupied()
        if not len(pixels):
            return 1.0

        def nll(log_temperature: float) -> float:
            scaled = logit / np.exp(log_temperature)
            return float((np.logaddexp(0, scaled) * pixels - scaled * foreground).sum() / pixels.sum())

        bounds = np.log(TEMPERATURES)
        found = minimize_scalar(nll, bounds=tuple(bounds), method="bounded", options={"xatol": 1e-6})
        return round(float(np.exp(found.x)), 4)

    def _occupied(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels, foreground pixels and mean logit of the steps that have any."""
        used = self._pixels > 0
        return self._pixels[used], self._foreground[used], self._logits[used] / self._pixels[used]


def _measures(pixels: np.ndarray, foreground: np.ndarray, logit: np.ndarray) -> dict[str, Any]:
    count = pixels.sum()
    if not count:
        return {}
    p = 1 / (1 + np.exp(-logit))
    brier = (foreground * (1 - p) ** 2 + (pixels - foreground) * p**2).sum() / count
    nll = (np.logaddexp(0, logit) * pixels - logit * foreground).sum() / count
    bins = np.minimum((p * BINS).astype(np.int64), BINS - 1)
    totals, sums, found = (np.bincount(bins, weights=w, minlength=BINS) for w in (pixels, p * pixels, foreground))
    rows = [
        {
            "pixels": int(n),
            "confidence": None if not n else float(s / n),
            "frequency": None if not n else float(f / n),
        }
        for n, s, f in zip(totals, sums, found)
    ]
    ece = float(np.abs(found - sums).sum() / count)
    return {"pixels": int(count), "ece": ece, "brier": float(brier), "nll": float(nll), "bins": rows}
