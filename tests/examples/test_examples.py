"""Each drop-in example runs, and its curve is the model's own within rounding; the notebook runs."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_segmenter import shared

from ntpseg.models.archive import pack_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


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


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Every code cell, with a tiny model and image in place of the named ones."""
    records, bundle, _ = shared()
    bundle.save_pretrained(tmp_path / "model")
    notebook = json.loads((EXAMPLES / "segment.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum(len(cell.splitlines()) for cell in cells) <= 20
    model, image = pack_bundle(tmp_path / "model", tmp_path / "model.zip", "card"), records[0].image
    names = {"MODEL": repr(str(model)), "IMAGE": repr(str(image))}
    space: dict[str, Any] = {}
    for cell in cells:
        for name, value in names.items():
            cell = re.sub(rf"^{name} = .*$", lambda match, n=name, v=value: f"{n} = {v}", cell, flags=re.MULTILINE)
        exec(compile(cell, "segment.ipynb", "exec"), space)
    assert len(space["predictions"]) == len(space["SENTENCES"])
    assert all(p.mask.shape == space["image"].shape[:2] for p in space["predictions"])
    space["figure"].savefig(tmp_path / "figure.png")
