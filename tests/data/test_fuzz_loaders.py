"""Damaged and strange files end in one of our errors, or are read; never in another exception.

In the suite they are shared out by what an example of each costs; see `fuzz_settings` for more.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dataset_files import picture, square
from fuzz_settings import fuzz_settings
from hypothesis import given
from hypothesis import strategies as st
from openpyxl import Workbook
from PIL import Image

from ntpseg.data import DataProblems, MaskOptions, check_records, load_records, read_image, read_mask, usable_records
from ntpseg.data.tables import read_table
from ntpseg.generation.folder import folder_jobs


def encoded(pixels: np.ndarray, suffix: str, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, format=suffix, **options)
    return buffer.getvalue()


def workbook(*rows: tuple[object, ...]) -> bytes:
    book, buffer = Workbook(), io.BytesIO()
    assert book.active is not None
    for row in rows:
        book.active.append(row)
    book.active.merge_cells("B3:B4")
    book.save(buffer)
    return buffer.getvalue()


TURNED = Image.Exif()
TURNED[274] = 6
IMAGES = [
    encoded(picture(), "PNG"),
    encoded(picture(), "PNG", "P"),
    encoded(picture(), "PNG", "RGBA"),
    encoded(picture(), "PNG", "1"),
    encoded(picture().astype(np.uint16) * 200, "PNG"),
    encoded(picture(), "TIFF", compression="tiff_lzw"),
    encoded(picture().astype(np.float32) - 100, "TIFF"),
    encoded(picture(), "JPEG", exif=TURNED),
    encoded(picture(), "GIF"),
    encoded(picture(), "BMP"),
    encoded(picture(), "PPM"),
    encoded(picture(), "WEBP"),
    encoded(square(), "PNG"),
]
TABLES = [
    b'Image,Description\na.png,The left lung.\nb.png,"Two, areas."\n',
    b"image;text\r\na.png;x\r\n",
    "Image\tDescription\na.png\t左肺\n".encode("utf-16"),
    b"sep=;\nimage;mask;text;split\na.png;b.png;t;train\n",
    workbook(("Image", "Description"), ("a.png", "The left lung."), (1.0, 5), ("c.png", "=A1")),
]

# Overwritten, cut out and repeated pieces; nothing at all; anything.
edits = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(0, 8),
        st.one_of(
            st.binary(max_size=6), st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b'"'])
        ),
    ),
    max_size=4,
)


def mutated(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    def apply(content: bytes, changes: list[tuple[float, int, bytes]], end: float) -> bytes:
        for where, gone, new in changes:
            at = int(where * len(content))
            content = content[:at] + new + content[at + gone :]
        return content[: int(end * len(content))]

    whole = st.builds(apply, st.sampled_from(seeds), edits, st.one_of(st.just(1.0), st.floats(0, 1)))
    return st.one_of(whole, whole, whole, st.binary(max_size=64), st.sampled_from([*IMAGES, *TABLES]))


@pytest.fixture(scope="module")
def place() -> Path:
    return Path(tempfile.mkdtemp())


def survives(function: Callable[[], object], name: str) -> bool:
    """Whether `function` returned; an error has to be one of ours, in one line that names the file."""
    try:
        function()
    except DataProblems:
        return False
    except (ValueError, FileNotFoundError) as error:
        assert "must " in str(error) and name in str(error) and "\n" not in str(error), str(error)
        return False
    return True


@fuzz_settings(600)
@given(content=mutated(IMAGES), suffix=st.sampled_from(["png", "tif", "jpg", "gif"]))
def test_images_and_masks(place: Path, content: bytes, suffix: str) -> None:
    path = place / f"fuzz.{suffix}"
    path.write_bytes(content)
    survives(lambda: read_image(path), path.name)
    for value in ("", "1", "#ff0000"):
        survives(lambda value=value: read_mask(path, value), path.name)


@pytest.mark.parametrize("content", IMAGES)
def test_the_unchanged_images_are_read(place: Path, content: bytes) -> None:
    path = place / "whole.png"
    path.write_bytes(content)
    assert survives(lambda: read_image(path), path.name)


@fuzz_settings(480)
@given(content=mutated(TABLES), suffix=st.sampled_from(["csv", "tsv", "xlsx", "xls"]))
def test_tables(place: Path, content: bytes, suffix: str) -> None:
    path = place / f"fuzz.{suffix}"
    path.write_bytes(content)
    survives(lambda: read_table(path), path.name)
    (place / "images").mkdir(exist_ok=True)
    (place / "images" / "a.png").touch()
    survives(lambda: folder_jobs(place / "images", None, path), "")


@fuzz_settings(60)
@given(member=st.sampled_from(["xl/workbook.xml", "xl/worksheets/sheet1.xml", "[Content_Types].xml"]), data=st.data())
def test_workbooks_with_damage_inside(place: Path, member: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(TABLES[-1])) as whole, zipfile.ZipFile(buffer, "w") as damaged:
        for name in whole.namelist():
            content = whole.read(name)
            damaged.writestr(name, data.draw(mutated([content])) if name == member else content)
    path = place / "inside.xlsx"
    path.write_bytes(buffer.getvalue())
    survives(lambda: read_table(path), path.name)


@fuzz_settings(60)
@given(
    layout=st.sampled_from(["lvit", "languide", "manifest"]),
    table=st.one_of(st.sampled_from(TABLES), mutated(TABLES)),
    image=st.one_of(st.sampled_from(IMAGES), mutated(IMAGES)),
    mask=st.one_of(st.just(IMAGES[-1]), mutated(IMAGES)),
    name=st.sampled_from(["a.png", "A.PNG", "mask_a.png", "a_mask.png", "1.png", "deep/a.png", "a.tif"]),
    options=st.builds(MaskOptions, st.booleans(), st.sampled_from(["", "2", "#00ff00"])),
)
def test_layouts(layout: str, table: bytes, image: bytes, mask: bytes, name: str, options: MaskOptions) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "set")
        places = {
            "lvit": ("Train_Folder/Train_text.csv", "Train_Folder/img", "Train_Folder/labelcol"),
            "languide": ("prompt/train.csv", "Train/Images", "Train/GTs"),
            "manifest": ("manifest.csv", ".", "."),
        }[layout]
        for path, content in (
            (root / places[0], table),
            (root / places[1] / name, image),
            (root / places[2] / ("b.png" if layout == "manifest" else name), mask),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        survives(lambda: check_records(root, masks=options), "")
        survives(lambda: usable_records(root, layout, skip_bad=True, masks=options), "")


ANNOTATIONS = [
    b'{"images": [{"id": 0, "file_name": "a.png"}], "annotations": [{"image_id": 0, "mask_file": "a_lung.png", '
    b'"sentences": [{"raw": "The lung."}, {"sent": "Lung."}]}], "categories": []}',
    b'[{"img_name": "a.png", "mask_name": "a_lung.png", "prompts": {"p0": "", "p1": ["The lung.", "Lung."]}}]',
    b'{"annotations": [{"file_name": "a\\ud800.png", "mask_file": null, "sentences": ["x", 1, {"raw": ["y"]}]}, 7]}',
    b'[{"img_name": ["a.png"], "mask_name": "../masks/a_lung.png", "prompts": "The \\ud800 lung."}, {}]',
]


@fuzz_settings(80)
@given(
    layout=st.sampled_from(["biomedparse", "medvlsm"]),
    content=st.one_of(st.sampled_from(ANNOTATIONS), mutated(ANNOTATIONS)),
)
def test_annotations(layout: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "set")
        places = {
            "biomedparse": ("train.json", "train", "train_mask"),
            "medvlsm": ("anns/train.json", "images", "masks"),
        }[layout]
        for path, written in (
            (root / places[0], content),
            (root / places[1] / "a.png", IMAGES[0]),
            (root / places[2] / "a_lung.png", IMAGES[-1]),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(written)
        for record in load_records(root, layout, skip_bad=True):
            assert record.text.encode() and record.mask is not None
        survives(lambda: check_records(root), "")
