"""Damaged tables of boxes and COCO files end in one of our errors, or are imported."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from fuzz_settings import fuzz_settings
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ntpseg.importers import IMPORTERS, ImportOptions

SEEDS = {
    "csv": b"image,text,x,y,w,h,image_width,image_height\na.png,The mass.,1,2,5,6,16,16\na.png,Mass.,0,0,4,4,,\n",
    "json": b'{"images": [{"id": 0, "file_name": "a.png", "width": 16, "height": 16}], "annotations": [{"id": 1, '
    b'"image_id": 0, "category_id": 2, "bbox": [1, 2, 5, 6], "label_text": "The mass."}], "categories": [{"id": 2, '
    b'"name": "Mass"}]}',
}
PIECES = [b"1e308", b"-1", b"NaN", b"Infinity", b"[]", b"{}", b"null", b'"', b",", b"\n", b"0", b"\\ud800", b"1e-300"]
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 6), st.one_of(st.sampled_from(PIECES), st.binary(max_size=4))), max_size=4
)


@fuzz_settings(120)
@given(suffix=st.sampled_from(list(SEEDS)), changes=edits)
def test_boxes(suffix: str, changes: list[tuple[float, int, bytes]]) -> None:
    content = SEEDS[suffix]
    for where, gone, new in changes:
        at = int(where * len(content))
        content = content[:at] + new + content[at + gone :]
    buffer = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(buffer, format="PNG")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"boxes.{suffix}")
        path.write_bytes(content)
        Path(folder, "a.png").write_bytes(buffer.getvalue())
        try:
            samples = [case.load() for case in IMPORTERS["boxes"].read(path, ImportOptions())]
        except ValueError as error:
            assert "must " in str(error) and "\n" not in str(error), str(error)
            return
        assert all(layer.shape == (16, 16) for sample in samples for layer in sample.labels)


@pytest.mark.parametrize("suffix", SEEDS)
def test_the_unchanged_tables_are_read(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"boxes.{suffix}").write_bytes(SEEDS[suffix])
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png")
    (case,) = IMPORTERS["boxes"].read(tmp_path, ImportOptions())
    assert len(case.load().structures) == (2 if suffix == "csv" else 1)
