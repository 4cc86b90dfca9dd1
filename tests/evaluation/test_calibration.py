"""Calibration figures against their definitions pixel by pixel, and the temperature of models of known calibration."""

from __future__ import annotations

import numpy as np
import pytest

from ntpseg.evaluation.calibration import BAND, BINS, TEMPERATURES, PixelCounts
from ntpseg.generation.calibration import calibrate


def drawn(count: int = 400_000, temperature: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose pixels are foreground exactly as often as they say, and then made too sure by a factor."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.5, 1.5, count)
    return calibrate(p, 1 / temperature), rng.random(count) < p


def counts(probability: np.ndarray, truth: np.ndarray) -> PixelCounts:
    made = PixelCounts()
    for part in np.array_split(np.arange(len(truth)), 3):
        made.add(probability[part], truth[part])
    return made


def by_definition(p: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    ece = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (p >= low) & ((p < low + 1 / BINS) | ((low + 1 / BINS > 1 - 1e-9) & (p <= 1)))
        if inside.any():
            ece += abs(truth[inside].mean() - p[inside].mean()) * inside.mean()
    own = np.where(truth, p, 1 - p)
    return {"ece": ece, "brier": float(((p - truth) ** 2).mean()), "nll": float(-np.log(own).mean())}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_figures_are_those_of_the_pixels(temperature: float) -> None:
    p, truth = drawn(60_000, temperature=2.0)
    p = np.clip(p, 2e-6, 1 - 2e-6).astype(np.float64)
    found = counts(p, truth).measures(temperature)
    scaled = 1 / (1 + ((1 - p) / p) ** (1 / temperature))
    for name, value in by_definition(scaled, truth).items():
        assert found[name] == pytest.approx(value, abs=2e-4), name
    band = (p > BAND[0]) & (p < BAND[1])
    assert found["pixels"] == 60_000 and found["band"]["pixels"] == pytest.approx(band.sum(), abs=30)
    for name, value in by_definition(scaled[band], truth[band]).items():
        assert found["band"][name] == pytest.approx(value, abs=3e-4), name
    assert sum(row["pixels"] for row in found["bins"]) == 60_000 and len(found["bins"]) == BINS


def test_a_perfectly_calibrated_model_has_no_error() -> None:
    made = counts(*drawn())
    found = made.measures()
    # The share of a bin of 10,000 pixels is off by 0.004 by chance.
    assert found["ece"] < 0.003 and found["band"]["ece"] < 0.004
    assert made.fit_temperature() == pytest.approx(1, abs=0.01)
    for row in found["bins"]:
        assert row["frequency"] == pytest.approx(row["confidence"], abs=0.02)


@pytest.mark.parametrize("factor", [0.5, 1.3, 3.0])
def test_the_factor_of_a_model_that_is_too_sure_is_found(factor: float) -> None:
    p, truth = drawn(temperature=factor)
    made = counts(p, truth)
    fitted = made.fit_temperature()
    assert fitted == pytest.approx(factor, rel=0.02)
    before, after = made.measures(), made.measures(fitted)
    assert after["nll"] < before["nll"] and after["brier"] < before["brier"]
    assert after["ece"] < 0.004 < 0.02 < before["ece"]
    assert after["band"]["pixels"] == before["band"]["pixels"]
    # Beside what is fitted every temperature is worse.
    assert all(made.measures(t * fitted)["nll"] > after["nll"] for t in (0.9, 1.1))
    # Of the probabilities that are returned the figures are the same.
    again = counts(calibrate(p, fitted), truth).measures()
    assert again["ece"] == pytest.approx(after["ece"], abs=2e-4)


def test_sure_pixels_are_no_news() -> None:
    """A mask without a doubt: two steps, no band, and a temperature that says how often it is wrong."""
    p, truth = np.zeros(1000), np.zeros(1000, bool)
    p[:500] = 1
    truth[:450] = truth[500:550] = True
    made = counts(p, truth)
    assert made.measures()["band"] is None and made.measures()["ece"] == pytest.approx(0.1, abs=1e-5)
    after = made.measures(made.fit_temperature())
    assert after["ece"] == pytest.approx(0, abs=1e-4) and after["bins"][-2]["confidence"] == pytest.approx(
        0.9, abs=1e-3
    )
    never_wrong = counts(np.array([0.2, 0.9]), np.array([False, True]))
    assert never_wrong.fit_temperature() == pytest.approx(TEMPERATURES[0], rel=1e-3)
    assert PixelCounts().fit_temperature() == 1
    with pytest.raises(ValueError, match=r"truth must have the shape of probability, \(2,\), got \(3,\)"):
        PixelCounts().add(np.zeros(2), np.zeros(3, bool))
