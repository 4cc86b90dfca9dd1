"""Boxes as masks: a table or COCO file of one's own, and MS-CXR on MIMIC-CXR-JPG."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ntpseg.data import inspect_dataset, load_records, read_truth
from ntpseg.importers import ImportOptions, import_dataset
from ntpseg.utils.files import read_csv

PATHS = [
    "files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg",
    "files/p10/p10000032/s53189527/2a2277a9-b0ded155.jpg",
    "files/p11/p11000011/s51029426/174413ec-4ec4c1f7.jpg",
]
HEADER = ["dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h", "image_width", "image_height", "split"]
RIGHT, BOTH = "Opacity in the right lung", "Bilateral effusions"
# Two boxes of one phrase in an image, another phrase that overlaps them, two more images.
ROWS = [
    ("Lung Opacity", RIGHT, 0, 4, 8, 10, 20, "train"),
    ("Pleural Effusion", BOTH, 0, 2, 30, 10, 8, "train"),
    ("Pleural Effusion", BOTH, 0, 20, 28, 8, 10, "train"),
    ("Pneumonia", RIGHT, 1, 0, 0, 16, 20, "train"),
    ("Pneumonia", "Left basal opacity", 2, 16, 20, 16, 20, "test"),
]


def picture(path: Path, width: int = 32, height: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(1).integers(0, 256, (height, width)).astype(np.uint8)
    Image.fromarray(values).save(path)
    return path


def mimic(root: Path, width: int = 32, height: int = 40) -> None:
    for path in PATHS:
        picture(root / path, width, height)


def ms_cxr_table(folder: Path, rows: list[tuple] = ROWS, name: str = "MS_CXR_Local_Alignment_v1.1.0.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(HEADER)
        for category, phrase, image, *box, split in rows:
            path = PATHS[image]
            table.writerow([Path(path).stem, category, phrase, path, *box, 32, 40, split])
    return folder / name


def ms_cxr_coco(folder: Path) -> Path:
    """The same as COCO: the size stands in images and in annotations, the phrase is label_text."""
    names = sorted({row[0] for row in ROWS})
    images = [{"id": n, "file_name": Path(p).name, "path": p, "width": 32, "height": 40} for n, p in enumerate(PATHS)]
    annotations = [
        {"id": n, "image_id": image, "category_id": names.index(category), "label_text": phrase, "bbox": box,
         "width": 32, "height": 40, "split": split}
        for n, (category, phrase, image, *box, split) in enumerate(ROWS)
    ]  # fmt: skip
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": c} for n, c in enumerate(names)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "MS_CXR_Local_Alignment_v1.1.0.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def area(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros((40, 32), bool)
    mask[y : y + h, x : x + w] = True
    return mask


@pytest.mark.parametrize("make", [ms_cxr_table, ms_cxr_coco])
@pytest.mark.parametrize("place", ["source", "download"])
def test_ms_cxr(tmp_path: Path, make, place: str) -> None:
    source = tmp_path / "physionet.org" / "files" / "ms-cxr" / "1.1.0"
    make(source)
    mimic(source if place == "source" else tmp_path / "physionet.org" / "files" / "mimic-cxr-jpg" / "2.0.0")
    done = import_dataset("ms-cxr", source, tmp_path / "out")
    assert (done.cases, done.images, done.masks) == (3, 3, 4)
    checked = inspect_dataset(tmp_path / "out")
    assert not checked.problems
    found = {(record.image.stem, record.text): record for record in checked.records}
    assert list(found) == [
        ("02aa804e-bde0afdd", RIGHT), ("02aa804e-bde0afdd", BOTH), ("2a2277a9-b0ded155", RIGHT),
        ("174413ec-4ec4c1f7", "Left basal opacity"),
    ]  # fmt: skip
    np.testing.assert_array_equal(read_truth(found["02aa804e-bde0afdd", RIGHT]), area(4, 8, 10, 20))
    np.testing.assert_array_equal(
        read_truth(found["02aa804e-bde0afdd", BOTH]), area(2, 30, 10, 8) | area(20, 28, 8, 10)
    )
    assert [(r.subject, r.split) for r in checked.records] == [("p10000032", "train")] * 3 + [("p11000011", "test")]
    assert {row["structure"] for row in read_csv(tmp_path / "out" / "manifest.csv")} == {row[0] for row in ROWS}


def test_ms_cxr_on_resized_images_of_another_format(tmp_path: Path) -> None:
    table = ms_cxr_table(tmp_path / "ms")
    for path in PATHS:
        picture(tmp_path / "ms" / path.replace(".jpg", ".png"), 16, 20)
    import_dataset("ms-cxr", table, tmp_path / "out")
    opacity = next(record for record in load_records(tmp_path / "out") if record.text == RIGHT)
    np.testing.assert_array_equal(read_truth(opacity), area(2, 4, 5, 10)[:20, :16])


@pytest.mark.parametrize(
    ("rows", "size", "reason"),
    [
        ([("Pneumonia", " ", 0, 4, 8, 10, 20, "train")], (32, 40), None),  # its class is asked for
        ([("", "", 0, 4, 8, 10, 20, "train")], (32, 40), "v1.1.0.csv row 2 must have a sentence or a class, got ''"),
        (
            [("Pneumonia", RIGHT, 0, 4, 8, "", 20, "train")],
            (32, 40),
            "row 2 must have four numbers of its box, got 4, 8",
        ),
        ([("Pneumonia", RIGHT, 0, 4, 8, 0, 20, "train")], (32, 40), "row 2 must have a box with an area"),
        (
            [("Pneumonia", RIGHT, 0, 40, 8, 10, 20, "train")],
            (32, 40),
            "row 2 must have a box inside the image of 32x40",
        ),
        ([("Pneumonia", RIGHT, 0, 4, 8, 10, 20, "third")], (32, 40), "row 2 must have the split train, val or test"),
        ([("Pneumonia", RIGHT, 0, 4, 8, 10, 20, "train")], (32, 32), "was it cropped or padded"),
        (
            [ROWS[0], ("Pneumonia", RIGHT, 1, 0, 0, 9, 9, "test")],
            (32, 40),
            "row 3 must have its patient in one split, got test, and train in other rows",
        ),
    ],
)
def test_ms_cxr_faults_name_the_row(
    tmp_path: Path, rows: list[tuple], size: tuple[int, int], reason: str | None
) -> None:
    ms_cxr_table(tmp_path / "ms", rows)
    mimic(tmp_path / "ms", *size)
    if reason is None:
        import_dataset("ms-cxr", tmp_path / "ms", tmp_path / "out")
        assert [record.text for record in load_records(tmp_path / "out")] == ["The pneumonia."]
        return
    with pytest.raises(ValueError, match=reason):
        import_dataset("ms-cxr", tmp_path / "ms", tmp_path / "out")


def test_ms_cxr_without_its_images(tmp_path: Path) -> None:
    ms_cxr_table(tmp_path / "ms")
    with pytest.raises(ValueError, match="must have the images of MIMIC-CXR-JPG, got no files/p10/p10000032"):
        import_dataset("ms-cxr", tmp_path / "ms", tmp_path / "out")
    picture(tmp_path / "ms" / PATHS[0])
    with pytest.raises(ValueError, match=r"row 5 must name an image that is there, got files/p10/.*2a2277a9"):
        import_dataset("ms-cxr", tmp_path / "ms", tmp_path / "out")
    done = import_dataset("ms-cxr", tmp_path / "ms", tmp_path / "out", ImportOptions(skip_bad=True))
    assert done.cases == 1 and len(done.skipped) == 2


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # Pascal VOC's columns, as CVAT exports them: width and height are the image's.
        ("filename,width,height,class,xmin,ymin,xmax,ymax\na.png,64,80,mass_lesion,8,16,28,56\n", "The mass lesion."),
        ("image,text,x,y,w,h\na,The mass.,4,8,10,20\n", "The mass."),
        ("image;caption;x1;y1;x2;y2\na.png;The mass, in the left lung.;4;8;14;28\n", "The mass, in the left lung."),
        ("image_id,class_name,x_min,y_min,x_max,y_max\na,Mass,4,8,14,28\nb,No finding,,,,\n", "The mass."),
        ("image,text,x,y,width,height\na.png,The mass.,3.6,7.6,10.2,20.2\n", "The mass."),
    ],
)
def test_tables_of_boxes(tmp_path: Path, table: str, expected: str) -> None:
    for name in "ab":
        picture(tmp_path / "set" / "images" / f"{name}.png")
    (tmp_path / "set" / "boxes.csv").write_text(table, encoding="utf-8")
    import_dataset("boxes", tmp_path / "set", tmp_path / "out")
    (record,) = load_records(tmp_path / "out")
    assert (record.text, record.subject) == (expected, "a")
    np.testing.assert_array_equal(read_truth(record), area(4, 8, 10, 20))


def test_boxes_without_a_table_or_a_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source must be a table of boxes"):
        import_dataset("boxes", tmp_path, tmp_path / "out")
    (tmp_path / "boxes.csv").write_text("image,text,x,y\na.png,The mass.,1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"boxes\.csv must have the column w, h, got image, text, x, y"):
        import_dataset("boxes", tmp_path, tmp_path / "out")
    (tmp_path / "more.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"got boxes\.csv, more\.json in .*; give one of these as SRC"):
        import_dataset("boxes", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="must be COCO's"):
        import_dataset("boxes", tmp_path / "more.json", tmp_path / "out")
