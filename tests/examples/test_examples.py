"""Each drop-in example runs, and its curve is the model's own within rounding; the notebook runs."""

from __future__ import annotations

import importlib
import json
import re
import shutil
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


@pytest.mark.parametrize("folder", ["", "examples"])
def test_the_notebook_runs(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code cell as it stands, from a checkout's root and from the notebook's own folder, where Jupyter works."""
    records, bundle, _ = shared()
    bundle.save_pretrained(tmp_path / "model")
    notebook = json.loads((EXAMPLES / "segment.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum(len(cell.splitlines()) for cell in cells) <= 24
    names = re.findall(r'^(?:MODEL|IMAGE) = ROOT / "(.*)"$', "\n".join(cells), re.MULTILINE)
    for name, source in zip(names, (pack_bundle(tmp_path / "model", tmp_path / "model.zip", "card"), records[0].image)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / name)
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    space: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, "segment.ipynb", "exec"), space)
    assert len(space["predictions"]) == len(space["SENTENCES"])
    assert all(p.mask.shape == space["image"].shape[:2] for p in space["predictions"])
    space["figure"].savefig(tmp_path / "figure.png")
