"""Metrics against a brute-force reference that shares no code with MONAI, and on empty masks."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_segmenter import shared

from ntpseg.evaluation import EvaluationOptions, evaluate, write_report
from ntpseg.evaluation.metrics import METRICS, Metric, concatenate, dice_scores, segmentation_metrics
from ntpseg.evaluation.tables import metric_rows
from ntpseg.generation import Segmenter


def edge(mask: np.ndarray) -> np.ndarray:
    """Coordinates of the mask's pixels that have a 4-neighbour outside it (or outside the image)."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inside).astype(float)


def brute_force(pred: np.ndarray, truth: np.ndarray) -> tuple[float, float, float, float]:
    overlap, total = (pred & truth).sum(), pred.sum() + truth.sum()
    a, b = edge(pred), edge(truth)
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    forward, backward = distance.min(1), distance.min(0)
    hd95 = max(np.percentile(forward, 95), np.percentile(backward, 95))
    assd = (forward.sum() + backward.sum()) / (len(forward) + len(backward))
    return 2 * overlap / total, overlap / (total - overlap), hd95, assd


def blobs(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    out = np.zeros((count, height, width), bool)
    for mask in out:
        for _ in range(rng.integers(1, 4)):
            cy, cx, ry, rx = rng.uniform(0, height), rng.uniform(0, width), *rng.uniform(1.5, height / 3, 2)
            mask |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    return out


@pytest.mark.parametrize(("height", "width"), [(24, 24), (17, 40), (33, 9)])
def test_equals_brute_force(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    pred, truth = blobs(rng, 12, height, width), blobs(rng, 12, height, width)
    pred[0] = truth[0]
    pred[1] = False
    pred[1, 0, 0] = True
    keep = pred.any((1, 2)) & truth.any((1, 2))
    pred, truth = pred[keep], truth[keep]
    result = segmentation_metrics(pred, truth)
    expected = np.array([brute_force(p, t) for p, t in zip(pred, truth, strict=True)])
    for column, name in enumerate(("dice", "iou", "hd95", "assd")):
        np.testing.assert_allclose(result[name], expected[:, column], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(dice_scores(pred, truth), result["dice"], rtol=1e-6)


def test_empty_masks_have_fixed_scores() -> None:
    empty, full = np.zeros((1, 30, 40), bool), np.zeros((1, 30, 40), bool)
    full[0, 3:6, 4:9] = True
    diagonal = 50.0
    for pred, truth, expected in (
        (empty, empty, (1.0, 1.0, 0.0, 0.0)),
        (empty, full, (0.0, 0.0, diagonal, diagonal)),
        (full, empty, (0.0, 0.0, diagonal, diagonal)),
    ):
        result = segmentation_metrics(pred, truth)
        assert tuple(float(result[name][0]) for name in ("dice", "iou", "hd95", "assd")) == expected
        assert float(dice_scores(pred, truth)[0]) == expected[0]


def test_no_case_is_dropped_and_counts_are_pixels() -> None:
    rng = np.random.default_rng(1)
    pred, truth = blobs(rng, 6, 20, 20), blobs(rng, 6, 20, 20)
    pred[2] = truth[4] = False
    pred[5] = truth[5] = False
    result = segmentation_metrics(torch.from_numpy(pred), torch.from_numpy(truth))
    assert all(len(values) == 6 and np.isfinite(values).all() for values in result.values())
    np.testing.assert_array_equal(result["intersection"], (pred & truth).sum((1, 2)))
    np.testing.assert_array_equal(result["predicted"], pred.sum((1, 2)))
    np.testing.assert_array_equal(result["true"], truth.sum((1, 2)))


def test_results_of_different_sizes_join_in_order() -> None:
    rng = np.random.default_rng(2)
    small, large = blobs(rng, 2, 12, 12), blobs(rng, 1, 25, 31)
    joined = concatenate([segmentation_metrics(small, small), segmentation_metrics(~large, large)])
    assert joined["dice"].tolist() == [1.0, 1.0, 0.0]
    assert all(len(v) == 0 for v in concatenate([]).values())


@pytest.mark.parametrize(
    ("pred", "truth", "message"),
    [
        (
            np.zeros((4, 4), bool),
            np.zeros((1, 4, 4), bool),
            r"prediction must be bool \[N, H, W\], got torch.bool \[4, 4\]",
        ),
        (np.zeros((1, 4, 4), bool), np.zeros((1, 4, 4), np.uint8), r"truth must be .* got torch.uint8"),
        (np.zeros((1, 4, 4), bool), np.zeros((1, 4, 5), bool), r"must have the shape of truth, \[1, 4, 5\]"),
    ],
)
def test_wrong_input_is_named(pred: np.ndarray, truth: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation_metrics(pred, truth)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "mask",
        [[[True]]],
        np.full((2, 4, 4), "x"),
        np.zeros((2, 4, 4)),
        torch.zeros(2, 4, 4, dtype=torch.bool, device="meta"),
    ],
)
def test_both_functions_name_what_is_no_mask(wrong: object) -> None:
    right = np.ones((2, 4, 4), bool)
    for function in (segmentation_metrics, dice_scores):
        with pytest.raises(ValueError, match=r"^prediction must be bool \[N, H, W\], got "):
            function(wrong, right)
        with pytest.raises(ValueError, match=r"^truth must be bool \[N, H, W\], got "):
            function(right, wrong)
        with pytest.raises(ValueError, match=r"^prediction must have the shape of truth, \[1, 4, 4\], got \[2, 4, 4\]"):
            function(right, right[:1])


def test_a_metric_of_the_table_shows_in_every_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records, bundle, _ = shared()
    precision = Metric(
        "precision", "Precision", 3, lambda p, t: (p * t).sum((2, 3)) / p.sum((2, 3)), 1.0, lambda height, width: 0.0,
        pooled=lambda counts: (counts["intersection"], counts["predicted"]), unit="%",
    )  # fmt: skip
    monkeypatch.setitem(METRICS, "precision", precision)
    result = evaluate(Segmenter(bundle), records[:3], EvaluationOptions(text_check=0))
    result.write(tmp_path / "eval" / "test")
    summary = json.loads((tmp_path / "eval" / "test" / "summary.json").read_text(encoding="utf-8"))
    cells = [result.per_case[name].sum() for name in ("intersection", "predicted")]
    assert summary["pooled"]["precision"]["value"] == pytest.approx(cells[0] / cells[1])
    assert summary["per_image"]["precision"]["value"] == pytest.approx(result.per_case["precision"].mean())
    assert "precision" in (tmp_path / "eval" / "test" / "cases.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "Precision (%)" in [row[0] for row in metric_rows(summary)]
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<td>Precision (%)</td>" in page and re.search(r"Precision [\d.]+ %", page)
    # A result that was written without it can still be shown.
    monkeypatch.setitem(METRICS, "later", dataclasses.replace(precision, name="later", label="Later"))
    assert "Later" not in write_report(tmp_path).read_text(encoding="utf-8")
