"""Each drop-in example runs, and its curve is the model's own within rounding."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("causal_lm", ["--steps", "3", "--vocabulary", "512", "--length", "24"]),
        ("causal_lm", ["--steps", "3", "--vocabulary", "512", "--length", "24", "--model", "emu3"]),
        ("llamagen_like", ["--steps", "3", "--codes", "512", "--tokens", "32"]),
        ("llamagen_like", ["--steps", "3", "--codes", "512", "--tokens", "32", "--condition", "caption"]),
        ("janus_like", ["--steps", "3", "--codes", "512", "--vocabulary", "512", "--tokens", "24"]),
        ("showo_like", ["--steps", "2", "--tokens", "24", "--width", "16", "--images", "2"]),
    ],
)
def test_curve_equals_the_models_own(name: str, arguments: list[str]) -> None:
    result = importlib.import_module(name).main(arguments)
    assert len(result["fused"]) >= 2
    assert result["fused"][0] != result["fused"][-1]
    assert result["difference"] < 2e-4
