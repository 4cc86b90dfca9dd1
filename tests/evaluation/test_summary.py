"""Means, pooled scores, bootstrap over subjects, groups."""

from __future__ import annotations

import numpy as np
import pytest

from ntpseg.evaluation.metrics import segmentation_metrics
from ntpseg.evaluation.summary import Bootstrap, summarise, summarise_groups


def cases(dice: list[float], size: list[int]) -> dict[str, np.ndarray]:
    """Per-case results with the wanted Dice, prediction and truth of `size` pixels each."""
    n, d = np.asarray(size), np.asarray(dice, float)
    return {
        "dice": d,
        "iou": d / (2 - d),
        "hd95": 1 - d,
        "assd": 1 - d,
        "intersection": d * n,
        "predicted": n,
        "true": n,
    }


def test_per_image_and_pooled_differ_as_defined() -> None:
    result = summarise(cases([1.0, 0.0], [900, 100]), ["a", "b"])
    assert result["per_image"]["dice"]["value"] == pytest.approx(0.5)
    assert result["pooled"]["dice"]["value"] == pytest.approx(0.9)
    assert result["pooled"]["iou"]["value"] == pytest.approx(900 / 1100)


def test_pooled_equals_the_score_of_one_joined_mask() -> None:
    rng = np.random.default_rng(0)
    pred, truth = rng.random((5, 16, 16)) < 0.4, rng.random((5, 16, 16)) < 0.3
    result = summarise(segmentation_metrics(pred, truth), list("abcde"))
    joined = segmentation_metrics(pred.reshape(1, 80, 16), truth.reshape(1, 80, 16))
    assert result["pooled"]["dice"]["value"] == pytest.approx(joined["dice"][0])
    assert result["pooled"]["iou"]["value"] == pytest.approx(joined["iou"][0])


def test_interval_is_the_bootstrap_over_subjects() -> None:
    rng = np.random.default_rng(3)
    subjects = [f"s{i // 4}" for i in range(80)]
    dice = np.clip(np.repeat(rng.uniform(0.2, 0.9, 20), 4) + rng.normal(0, 0.01, 80), 0, 1)
    result = summarise(cases(dice.tolist(), [100] * 80), subjects, Bootstrap(resamples=4000))["per_image"]["dice"]
    draws = [np.concatenate([dice[4 * s : 4 * s + 4] for s in rng.integers(0, 20, 20)]).mean() for _ in range(4000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    assert result["low"] == pytest.approx(low, abs=0.01)
    assert result["high"] == pytest.approx(high, abs=0.01)
    # Taking the 80 images for independent would give an interval half as wide.
    single = summarise(cases(dice.tolist(), [100] * 80), [str(i) for i in range(80)])["per_image"]["dice"]
    assert (single["high"] - single["low"]) < 0.65 * (result["high"] - result["low"])


def test_interval_is_reproducible_and_absent_for_one_subject() -> None:
    data = cases([0.2, 0.5, 0.9], [10, 20, 30])
    assert summarise(data, ["a", "b", "c"]) == summarise(data, ["a", "b", "c"])
    alone = summarise(data, ["a", "a", "a"])
    assert alone["subjects"] == 1
    assert alone["per_image"]["dice"]["low"] is None


def test_all_empty_is_perfect() -> None:
    empty = np.zeros((3, 8, 8), bool)
    result = summarise(segmentation_metrics(empty, empty), ["a", "b", "c"])
    assert result["pooled"]["dice"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["per_image"]["hd95"]["value"] == 0.0


def test_groups_come_largest_first() -> None:
    data = cases([0.0, 1.0, 1.0, 0.5], [10] * 4)
    result = summarise_groups(data, ["a", "b", "c", "d"], ["liver", "lung", "lung", "heart"])
    assert list(result) == ["lung", "heart", "liver"]
    assert result["lung"]["per_image"]["dice"]["value"] == 1.0
    assert result["heart"]["cases"] == 1


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="subjects must have the length of the cases, 2, got 1"):
        summarise(cases([0.1, 0.2], [1, 1]), ["a"])
    with pytest.raises(ValueError, match="0 cases"):
        summarise(cases([], []), [])
    with pytest.raises(ValueError, match=r"level must be a number > 0 and < 1, got 1\.5"):
        Bootstrap(level=1.5)
