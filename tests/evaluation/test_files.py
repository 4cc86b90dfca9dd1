"""Result files are whole or absent."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from ntpseg.evaluation import files


def test_csv_and_json_keep_commas_quotes_and_unicode(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "deep" / "a.csv", ["text", "dice"], [['a, "b"\nc', 0.5], ["ü", 1]])
    with (tmp_path / "deep" / "a.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["text", "dice"], ['a, "b"\nc', "0.5"], ["ü", "1"]]
    files.write_json(tmp_path / "a.json", {"ü": None})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": None}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_mask_png_is_0_and_255(tmp_path: Path) -> None:
    from PIL import Image

    mask = np.zeros((5, 7), bool)
    mask[1, 2] = True
    files.write_png(tmp_path / "m.png", mask)
    back = np.asarray(Image.open(tmp_path / "m.png"))
    assert back.shape == (5, 7) and set(np.unique(back)) == {0, 255} and back[1, 2] == 255
