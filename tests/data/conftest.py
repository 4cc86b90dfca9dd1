"""Small data sets of every layout, and the real ones where they are present."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_files import picture, save, square, table

Names = dict[str, list[tuple[str, str, str]]]


@pytest.fixture
def lvit(tmp_path: Path) -> Callable[[Names], Path]:
    """Write LViT's layout from {split: [(image name, mask name, name in the table)]}; captions are "Text of NAME."."""

    def make(splits: Names) -> Path:
        root = tmp_path / "lvit"
        for split, names in splits.items():
            folder = root / f"{split}_Folder"
            for number, (image, mask, _) in enumerate(names):
                save(folder / "img" / image, picture(seed=number))
                save(folder / "labelcol" / mask, square())
            rows = [{"Image": name, "Description": f"Text of {name}."} for _, _, name in names]
            table(folder / f"{split}_text.xlsx", rows)
        return root

    return make


@pytest.fixture
def good(lvit: Callable[[Names], Path]) -> Path:
    """A faultless data set in LViT's layout: two training pairs, one test pair."""
    train = [("a.png", "mask_a.png", "mask_a.png"), ("b.png", "mask_b.png", "mask_b.png")]
    return lvit({"Train": train, "Test": [("c.png", "mask_c.png", "mask_c.png")]})


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository, or the test is skipped."""
    root = Path(os.environ.get("NTPSEG_SHARED_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
    if not (root / "cxr_referring").is_dir():
        pytest.skip("the real data sets are not here (set NTPSEG_SHARED_DATA)")
    return root
