"""The README's figure is made of what an evaluation wrote, by a rule or of the cases that are named."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy.readme_figure import choose, main

DICE = {"low": (0.1, 0.2), "middle": (0.9, 0.1, 0.5, 0.7, 0.3), "high": (0.9, 0.8)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory as ``ntpseg eval`` leaves it: three images, nine cases, one prediction empty."""
    folder = tmp_path / "run" / "eval" / "test"
    (folder / "masks").mkdir(parents=True)
    rows = []
    for image, scores in DICE.items():
        pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{image}.png")
        for number, dice in enumerate(scores):
            name, mask = f"{image}-{number}", np.zeros((40, 48), np.uint8)
            mask[10:20, 10 : 20 + number] = 255
            Image.fromarray(mask).save(tmp_path / f"{name}.png")
            Image.fromarray(mask if dice > 0.1 else 0 * mask).save(folder / "masks" / f"{name}.png")
            paths = {"image": tmp_path / f"{image}.png", "mask": tmp_path / f"{name}.png"}
            row = {"file": name, "subject": "s1", "text": "The left lung.", "image_sha1": image, "dice": dice}
            rows.append(row | paths)
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "run"


@pytest.mark.parametrize("files", [[], ["middle-1", "middle-0"]])
def test_figure_is_small_and_as_wide_as_its_panels(
    run: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures" / "out.png"
    main([str(run), str(out), *(["--files", *files] if files else [])])
    with Image.open(out) as image:
        assert image.width == pytest.approx(364 * (1 + (len(files) or 3)), abs=2)
    assert out.stat().st_size < 300 * 1024
    assert "mean Dice of its 9 pairs 0.500" in capsys.readouterr().out


def test_the_median_image_at_its_quartiles(run: Path) -> None:
    with (run / "eval" / "test" / "cases.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in choose(rows)] == ["middle-3", "middle-2", "middle-4"]
    with pytest.raises(ValueError, match="one image, got low-0, high-0"):
        choose(rows, ["low-0", "high-0"])
    with pytest.raises(ValueError, match=r"cases.csv, got nobody"):
        choose(rows, ["low-0", "nobody"])


def test_a_run_without_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run must have eval/test/cases.csv, which ntpseg eval writes"):
        main([str(tmp_path), str(tmp_path / "out.png")])
