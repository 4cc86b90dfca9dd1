"""Distances in millimetres and scores of volumes, against a brute-force reference in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt

from ntpseg.data import Record, SlicePlace
from ntpseg.evaluation.metrics import segmentation_metrics
from ntpseg.evaluation.summary import summarise
from ntpseg.evaluation.volumes import score_volumes, summarise_volumes, volume_scores


def reference(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    """HD95 and ASSD between the surfaces: every point of one against every point of the other."""

    def surface(mask: np.ndarray) -> np.ndarray:
        return np.argwhere(mask & ~binary_erosion(mask)) * np.array(spacing)

    a, b = surface(pred), surface(truth)
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    there, back = distance.min(1), distance.min(0)
    return max(np.percentile(there, 95), np.percentile(back, 95)), np.concatenate([there, back]).mean()


def by_transform(pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    """The same by SciPy's distance transforms."""
    edges = [mask & ~binary_erosion(mask) for mask in (pred, truth)]
    there, back = (distance_transform_edt(~b, sampling=spacing)[a] for a, b in (edges, edges[::-1]))
    return max(np.percentile(there, 95), np.percentile(back, 95)), np.concatenate([there, back]).mean()


def blob(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    grid = np.indices(shape)
    for _ in range(3):
        centre = [rng.uniform(0, n) for n in shape]
        radius = [rng.uniform(1, max(n / 3, 1.5)) for n in shape]
        mask |= sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius)) < 1
    return mask


@pytest.mark.parametrize("spacing", [(0.7, 0.7), (0.5, 2.25), (3.0, 0.4)])
def test_slices_in_millimetres(spacing: tuple[float, float]) -> None:
    rng = np.random.default_rng(1)
    for shape in ((23, 17), (1, 31), (40, 9)):
        pred, truth = blob(rng, shape), blob(rng, shape)
        pred[0, 0] = truth[-1, -1] = True
        scores = segmentation_metrics(pred[None], truth[None], spacing)
        expected = reference(pred, truth, spacing)
        np.testing.assert_allclose(by_transform(pred, truth, spacing), expected, rtol=1e-12)
        assert scores["hd95_mm"][0] == pytest.approx(expected[0], rel=1e-5)
        assert scores["assd_mm"][0] == pytest.approx(expected[1], rel=1e-5)
        area = abs(int(pred.sum()) - int(truth.sum())) * spacing[0] * spacing[1]
        assert scores["area_error_mm2"][0] == pytest.approx(area)


def test_empty_slices_in_millimetres() -> None:
    empty, full = np.zeros((1, 3, 4), bool), np.ones((1, 3, 4), bool)
    one = segmentation_metrics(empty, full, (2.0, 0.5))
    assert one["hd95_mm"][0] == one["assd_mm"][0] == pytest.approx(math.hypot(6, 2))
    assert one["area_error_mm2"][0] == pytest.approx(12)
    both = segmentation_metrics(empty, empty, (2.0, 0.5))
    assert both["hd95_mm"][0] == both["assd_mm"][0] == both["area_error_mm2"][0] == 0
    assert "hd95_mm" not in segmentation_metrics(empty, full)
    with pytest.raises(ValueError, match="pixel_mm of a row must be a number > 0, got 0"):
        segmentation_metrics(empty, full, (0, 1))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 0.9), (0.6, 2.0, 1.3)])
@pytest.mark.parametrize("shape", [(7, 19, 13), (1, 11, 8), (16, 5, 5)])
def test_volumes_equal_the_reference(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(sum(shape))
    pred, truth = blob(rng, shape), blob(rng, shape)
    pred[0, 0, 0] = truth[-1, -1, -2] = True
    scores = volume_scores(pred, truth, spacing)
    expected = reference(pred, truth, spacing)
    np.testing.assert_allclose(by_transform(pred, truth, spacing), expected, rtol=1e-12)
    overlap, total = int((pred & truth).sum()), int(pred.sum()) + int(truth.sum())
    assert scores["dice"] == pytest.approx(2 * overlap / total, rel=1e-12)
    assert scores["iou"] == pytest.approx(overlap / (total - overlap), rel=1e-12)
    assert scores["hd95_mm"] == pytest.approx(expected[0], rel=1e-5)
    assert scores["assd_mm"] == pytest.approx(expected[1], rel=1e-5)
    error = abs(int(pred.sum()) - int(truth.sum())) * math.prod(spacing) / 1000
    assert scores["volume_error_ml"] == pytest.approx(error)


def test_empty_volumes() -> None:
    empty, full = np.zeros((2, 3, 4), bool), np.ones((2, 3, 4), bool)
    both = volume_scores(empty, empty, (1, 1, 1))
    assert both == {"dice": 1, "iou": 1, "hd95_mm": 0, "assd_mm": 0, "volume_error_ml": 0}
    one = volume_scores(empty, full, (5, 2, 1))
    assert (one["dice"], one["iou"]) == (0, 0)
    assert one["hd95_mm"] == pytest.approx(math.sqrt(10**2 + 6**2 + 4**2))
    assert one["volume_error_ml"] == pytest.approx(24 * 10 / 1000)
    assert volume_scores(full, full) == {"dice": 1, "iou": 1}
    with pytest.raises(ValueError, match="prediction must have the shape"):
        volume_scores(full[:1], full)


def record(index: int, structure: str = "liver", text: str = "The liver.", volume: str = "v", mm=(4.0, 1.0, 2.0)):
    place = SlicePlace(volume, "axial", index, *mm, structure=structure)
    return Record(Path("i"), Path("m"), text, "test", f"{volume}{index}{structure}{text}", f"p-{volume}", "", place)


def test_slices_are_put_together_in_their_order() -> None:
    rng = np.random.default_rng(0)
    pred, truth = blob(rng, (6, 9, 8)), blob(rng, (6, 9, 8))
    order = [3, 0, 5, 1, 4, 2]
    records = [record(10 + n) for n in order]
    [score] = score_volumes(records, [pred[n] for n in order], [truth[n] for n in order])
    assert score.scores == volume_scores(pred, truth, (4.0, 1.0, 2.0))
    assert (score.slices, score.missing, score.step, score.text) == (6, 0, 1, "The liver.")
    assert (score.predicted, score.true) == (pred.sum(), truth.sum())
    assert score.voxel_ml == pytest.approx(0.008)


def test_every_third_slice_is_a_thicker_slice() -> None:
    truth = np.ones((2, 3, 3), bool)
    [score] = score_volumes([record(2), record(5)], list(~truth), list(truth))
    assert (score.step, score.missing, score.voxel_mm) == (3, 0, (12.0, 1.0, 2.0))
    assert score.scores["volume_error_ml"] == pytest.approx(18 * 24 / 1000)
    assert score.scores["hd95_mm"] == pytest.approx(math.sqrt(24**2 + 3**2 + 6**2))


def test_a_missing_slice_counts_in_neither_mask() -> None:
    full, empty = np.ones((3, 3), bool), np.zeros((3, 3), bool)
    records = [record(n) for n in (0, 1, 3)]
    [score] = score_volumes(records, [full, empty, full], [full, full, full])
    assert (score.slices, score.missing, score.step) == (3, 1, 1)
    assert (score.intersection, score.predicted, score.true) == (18, 18, 27)
    assert score.scores["dice"] == pytest.approx(36 / 45)


def test_groups_are_structures_and_sentences_where_slices_have_several() -> None:
    full = np.ones((2, 2), bool)
    records = [record(n, text=f"Liver {n}.") for n in range(2)]
    records += [record(n, "spleen", text) for n in range(2) for text in ("The spleen.", "Spleen.")]
    records += [record(n, "", text) for n in range(2) for text in ("A.", "B.")]
    records += [record(0, volume="w"), Record(Path("i"), Path("m"), "x", "test", "2d", "q")]
    scores = score_volumes(records, [full] * len(records), [full] * len(records))
    found = [(s.volume, s.structure, s.text, s.slices) for s in scores]
    assert found == [
        ("v", "liver", "", 2),
        ("v", "spleen", "The spleen.", 2),
        ("v", "spleen", "Spleen.", 2),
        ("v", "A.", "A.", 2),
        ("v", "B.", "B.", 2),
        ("w", "liver", "The liver.", 1),
    ]


def test_slices_of_different_sizes_are_refused() -> None:
    masks = [np.ones((2, 2), bool), np.ones((2, 3), bool)]
    with pytest.raises(ValueError, match=r"slices of volume 'v' must have one size, got \[2, 2\] and \[2, 3\]"):
        score_volumes([record(0), record(1)], masks, masks)


def test_means_of_volumes_are_of_one_unit() -> None:
    """A volume without known millimetres has Dice, and is in no mean of millimetres."""
    full = np.ones((2, 2), bool)
    records = [record(0, volume="a"), record(0, volume="b"), record(0, volume="c", mm=(None, 1.0, 1.0))]
    scores = score_volumes(records, [full, ~full, ~full], [full] * 3)
    summary = summarise_volumes(scores)
    assert (summary["cases"], summary["volumes"], summary["subjects"]) == (3, 3, 3)
    assert summary["per_volume"]["dice"]["value"] == pytest.approx(1 / 3)
    assert summary["per_volume"]["dice"]["cases"] == 3
    distance = summary["per_volume"]["hd95_mm"]
    assert distance["cases"] == 2
    assert distance["value"] == pytest.approx(math.sqrt(4**2 + 2**2 + 4**2) / 2)
    assert 0 == distance["low"] <= distance["value"] <= distance["high"]
    assert summary["structures"]["liver"]["per_volume"] == summary["per_volume"]
    assert "hd95_mm" not in summarise_volumes(scores[2:])["per_volume"]


def test_a_mean_of_slices_is_of_millimetres_or_of_pixels() -> None:
    empty, full = np.zeros((1, 3, 4), bool), np.ones((1, 3, 4), bool)
    parts = [segmentation_metrics(empty, full, (2.0, 2.0)), segmentation_metrics(empty, full)]
    cases = {name: np.concatenate([part.get(name, np.full(1, np.nan)) for part in parts]) for name in parts[0]}
    summary = summarise(cases, ["a", "b"])
    assert summary["per_image"]["hd95"]["value"] == pytest.approx(5)
    assert summary["millimetres"]["hd95_mm"] == {"value": pytest.approx(10), "low": None, "high": None, "cases": 1}
    assert "millimetres" not in summarise(segmentation_metrics(empty, full), ["a"])
