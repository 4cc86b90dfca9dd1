"""Layouts of public data sets that are read in place: one tiny sample of each, as its repository lays it out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import picture, save, square, table

from ntpseg.data import Record, check_records, load_records, read_image, read_truth
from ntpseg.data.layouts.biomedparse import describe_name, subject_of_image
from ntpseg.data.loading import detect_layout


def found(path: Path) -> list[tuple[str, str, str]]:
    """(kind, name, detail) of every problem."""
    return [(problem.kind, problem.name, problem.detail) for problem in check_records(path)]


def texts(records: list[Record]) -> list[tuple[str, str, str]]:
    return [(record.split, record.case, record.text) for record in records]


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def annotation(image_id: int, mask: str, *sentences: str) -> dict[str, Any]:
    """As BiomedParse's create-customer-datasets.py writes it."""
    said = [{"raw": text, "sent": text, "sent_id": place} for place, text in enumerate(sentences)]
    return {"mask_file": mask, "iscrowd": 0, "image_id": image_id, "category_id": 3, "id": image_id, "sentences": said}


@pytest.fixture
def biomedparse(tmp_path: Path) -> Path:
    """Three images; a mask of 0/255, one of 0/1, one with two sentences."""
    root = tmp_path / "amos22"
    for name in ("train/amos_0001_12_CT_abdomen", "train/amos_0001_13_CT_abdomen", "test/08_MRI_heart"):
        save(root / f"{name}.png", np.stack([picture()] * 3, axis=2))
    save(root / "train_mask" / "amos_0001_12_CT_abdomen_left+kidney.png", square())
    save(root / "train_mask" / "amos_0001_12_CT_abdomen_liver.png", square(at=8) // 255)
    save(root / "train_mask" / "amos_0001_13_CT_abdomen_liver.png", square(at=2))
    save(root / "test_mask" / "08_MRI_heart_left+heart+ventricle.png", square())
    names = [f"amos_0001_{number}_CT_abdomen.png" for number in (12, 13)]
    annotations = [
        annotation(0, "amos_0001_12_CT_abdomen_left+kidney.png", "left kidney in abdomen CT"),
        annotation(0, "amos_0001_12_CT_abdomen_liver.png", "liver in abdomen CT", "Hepatic tissue.", "Hepatic tissue."),
        # The second version's files name the image in the annotation.
        annotation(7, "amos_0001_13_CT_abdomen_liver.png", "liver in abdomen CT") | {"file_name": names[1]},
    ]
    images = [{"id": place, "file_name": name, "width": 16, "height": 16} for place, name in enumerate(names)]
    write_json(root / "train.json", {"images": images, "annotations": annotations, "categories": [{"id": 3}]})
    return root


def test_biomedparse_with_json_and_without(biomedparse: Path) -> None:
    assert detect_layout(biomedparse).name == "biomedparse"
    records = load_records(biomedparse)
    # Two sentences of one mask: its name goes on with a digest of the sentence.
    assert all(re.fullmatch("amos_0001_12_CT_abdomen_liver__[0-9a-f]{6}", record.case) for record in records[1:3])
    assert [(split, text) for split, _, text in texts(records)] == [
        ("train", "left kidney in abdomen CT"),
        ("train", "liver in abdomen CT"),
        ("train", "Hepatic tissue."),
        ("train", "liver in abdomen CT"),
        ("test", "left heart ventricle in heart MRI"),
    ]
    assert len({record.case for record in records}) == 5
    assert [record.subject for record in records] == ["amos_0001"] * 4 + ["08"]
    assert found(biomedparse) == []
    kidney, small, *_ = records
    assert read_truth(kidney).sum() == read_truth(small).sum() == 16
    assert read_truth(kidney)[4, 4] and read_truth(small)[8, 8] and read_image(kidney.image).shape == (16, 16)
    (biomedparse / "train.json").unlink()
    named = load_records(biomedparse)
    assert texts(named)[:3] == [
        ("train", "amos_0001_12_CT_abdomen_left+kidney", "left kidney in abdomen CT"),
        ("train", "amos_0001_12_CT_abdomen_liver", "liver in abdomen CT"),
        ("train", "amos_0001_13_CT_abdomen_liver", "liver in abdomen CT"),
    ]


@pytest.mark.parametrize(
    ("name", "sentence", "subject"),
    [
        # All names are of images that BiomedParse's repository shows.
        ("09_MRI-FLAIR_brain_lower-grade+glioma.png", "lower-grade glioma in brain MRI-FLAIR", "09"),
        ("coronacases_003_123_CT_lung_COVID-19+infection.png", "COVID-19 infection in lung CT", "coronacases_003"),
        ("TCGA_HT_7856_19950831_8_MRI-FLAIR_brain_tumor.png", "tumor in brain MRI-FLAIR", "TCGA_HT_7856_19950831"),
        ("covid_1585_X-Ray_chest_COVID-19+infection.png", "COVID-19 infection in chest X-Ray", "covid_1585"),
        ("sub-S09345_ses-E1_X-Ray_chest_lung.png", "lung in chest X-Ray", "sub-S09345"),
        ("amos_0001_CT_abdomen_liver.png", "liver in abdomen CT", "amos_0001"),
        ("scan1_liver.png", "liver", "scan1"),
    ],
)
def test_biomedparse_names(name: str, sentence: str, subject: str) -> None:
    assert describe_name(name) == sentence
    assert subject_of_image(name.rpartition("_")[0] + ".png") == subject


def test_biomedparse_problems(biomedparse: Path) -> None:
    content = json.loads((biomedparse / "train.json").read_text())
    content["annotations"] += [
        annotation(0, "amos_0001_12_CT_abdomen_spleen.png", "spleen in abdomen CT"),
        annotation(9, "amos_0001_13_CT_abdomen_liver.png", "liver"),
        annotation(1, "amos_0001_13_CT_abdomen_liver.png", " "),
        content["annotations"][0],
        "kidney",
    ]
    write_json(biomedparse / "train.json", content)
    save(biomedparse / "train" / "new_CT_lung.png", picture())
    save(biomedparse / "test_mask" / "09_MRI_heart_myocardium.png", square())
    save(biomedparse / "test" / "10_MRI_heart.png", picture())
    problems = {(kind, name): detail for kind, name, detail in found(biomedparse)}
    assert problems == {
        ("malformed row", "train.json entry 7"): "it must be an object, got 'kidney'",
        ("missing mask", "train.json annotation 3 amos_0001_12_CT_abdomen_spleen.png"): (
            "there is no amos_0001_12_CT_abdomen_spleen.png in train_mask"
        ),
        ("caption without image", "train.json annotation 4 amos_0001_13_CT_abdomen_liver.png"): "it names no image",
        ("image without caption", "train.json annotation 5 amos_0001_13_CT_abdomen_liver.png"): "it has no sentence",
        ("duplicate row", "train.json annotation 6 amos_0001_12_CT_abdomen_left+kidney.png"): (
            "'left kidney in abdomen CT' is there twice for amos_0001_12_CT_abdomen_left+kidney.png; it counts once"
        ),
        ("image without caption", "train/new_CT_lung.png"): "train.json does not name it",
        ("mask without image", "test_mask/09_MRI_heart_myocardium.png"): "no image 09_MRI_heart in test",
        ("missing mask", "test/10_MRI_heart.png"): "no 10_MRI_heart_TARGET in test_mask",
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:24\n", "git lfs pull"),
        (b"", "an empty file"),
        (b'{"images": [', "no JSON"),
        (b"\xff\xfe{", "another encoding than UTF-8"),
        (b"[]", "no list of annotations"),
        (b"[" * 100_000, "lists in lists"),
    ],
)
def test_biomedparse_json_that_is_none(biomedparse: Path, content: bytes, reason: str) -> None:
    (biomedparse / "train.json").write_bytes(content)
    ((kind, name, detail),) = found(biomedparse)
    assert (kind, name) == ("unreadable file", "train.json") and reason in detail


def test_a_table_has_precedence_over_names(biomedparse: Path) -> None:
    rows = [{"image": "test/08_MRI_heart.png", "mask": "test_mask/08_MRI_heart_left+heart+ventricle.png", "text": "T."}]
    table(biomedparse / "pairs.csv", rows)
    assert detect_layout(biomedparse).name == "biomedparse"  # a train.json says more than some table
    (biomedparse / "train.json").unlink()
    assert detect_layout(biomedparse).name == "manifest"
    table(biomedparse / "manifest.csv", rows)
    assert detect_layout(biomedparse).name == "manifest"


@pytest.mark.parametrize(("folder", "split"), [("demo", "test"), ("valid", "val"), ("Train", "train")])
def test_biomedparse_splits(tmp_path: Path, folder: str, split: str) -> None:
    save(tmp_path / folder / "02_CT_lung.png", picture())
    save(tmp_path / f"{folder}_mask" / "02_CT_lung_tumor.png", square())
    assert texts(load_records(tmp_path)) == [(split, "02_CT_lung_tumor", "tumor in lung CT")]


def test_medvlsm(tmp_path: Path) -> None:
    root = tmp_path / "camus"
    save(root / "images" / "patient0001_2CH_ED.png", picture())
    for name in ("mask_1", "mask_2"):
        save(root / "masks" / name / "patient0001_2CH_ED_gt.png", square())
    views = ["Left ventricular cavity of the heart.", "Left ventricular cavity in the cardiac ultrasound."]
    entry = {
        "img_name": "patient0001_2CH_ED.png",
        "mask_name": "mask_1/patient0001_2CH_ED_gt.png",
        "bbox": [1, 2, 3, 4],
    }
    write_json(root / "anns" / "train.json", [entry | {"prompts": {"p0": "", "p1": views, "p2": views[0]}}])
    other = entry | {"mask_name": "mask_2/patient0001_2CH_ED_gt.png", "prompts": {"p0": "", "p1": "Myocardium."}}
    write_json(root / "anns" / "val.json", [other, entry | {"mask_name": "mask_3/x.png"}, entry])
    write_json(root / "anns" / "test.json", [])
    assert detect_layout(root).name == "medvlsm"
    records = load_records(root, skip_bad=True)
    assert [(record.split, record.text) for record in records] == [
        ("train", views[0]), ("train", views[1]), ("val", "Myocardium."),
    ]  # fmt: skip
    assert records[2].case == "mask_2__patient0001_2CH_ED_gt" and len({record.case for record in records}) == 3
    assert {record.mask.parent.name for record in records if record.mask} == {"mask_1", "mask_2"}
    assert found(root) == [
        ("missing mask", "val.json entry 1 mask_3/x.png", "there is no mask_3/x.png in masks"),
        ("image without caption", "val.json entry 2 mask_1/patient0001_2CH_ED_gt.png", "it has no sentence"),
    ]
    write_json(root / "anns" / "val.json", {"images": []})
    ((kind, name, detail),) = found(root)
    assert (kind, name) == ("unreadable file", "anns/val.json") and "MedVLSM's JSON files are lists" in detail


@pytest.mark.parametrize(
    ("layout", "needed"), [("biomedparse", "train and train_mask"), ("medvlsm", "anns/train.json")]
)
def test_layouts_that_a_folder_does_not_have(tmp_path: Path, layout: str, needed: str) -> None:
    with pytest.raises(ValueError, match=needed):
        load_records(tmp_path, layout)
