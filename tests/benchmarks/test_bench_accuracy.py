"""The baselines run on a data set and write the same figures as an evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_segmenter import shared

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("text_prior", "--size", "32"),
        ("unet", "--size", "32", "--minutes", "0.04", "--width", "4", "--text", "--threads", "1"),
    ],
)
def test_baseline_scores_a_data_set(arguments: tuple[str, ...], tmp_path: Path) -> None:
    records, _, run = shared()
    script, *rest = arguments
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", f"benchmarks.accuracy.{script}", str(run.parent / "data.csv"), *rest]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(out)], check=True, env=environment, timeout=200, capture_output=True)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["test"]["cases"] == sum(r.split == "test" for r in records)
    assert 0 <= result["test"]["per_image"]["dice"]["value"] <= 1
    assert 0 <= result["test"]["pooled"]["dice"]["value"] <= 1
    if script == "text_prior":
        # Left and right squares are where they were in training: the caption alone finds most of them.
        assert result["test"]["per_image"]["dice"]["value"] > 0.5
    else:
        assert result["curve"][-1]["minutes"] >= 0.04
