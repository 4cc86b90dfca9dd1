"""Layouts of public data sets that are read in place: one tiny sample of each, as its repository lays it out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import picture, save, square, table

from ntpseg.data import Record, check_records, inspect_dataset, load_records, read_image, read_truth
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
    for number in (1, 2):
        save(root / "images" / f"patient000{number}_2CH_ED.png", picture())
    for name in ("mask_1", "mask_2"):
        save(root / "masks" / name / "patient0001_2CH_ED_gt.png", square())
    views = ["Left ventricular cavity of the heart.", "Left ventricular cavity in the cardiac ultrasound."]
    entry = {
        "img_name": "patient0001_2CH_ED.png",
        "mask_name": "mask_1/patient0001_2CH_ED_gt.png",
        "bbox": [1, 2, 3, 4],
    }
    write_json(root / "anns" / "train.json", [entry | {"prompts": {"p0": "", "p1": views, "p2": views[0]}}])
    write_json(root / "anns" / "val.json", [entry | {"prompts": {"p1": "Myocardium."}}])
    assert {kind for kind, _, _ in found(root)} == {"image in two splits"}
    entry["img_name"] = "patient0002_2CH_ED.png"
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


def pair(folder: Path, name: str, mask: str, images: str = "img", masks: str = "labelcol") -> None:
    save(folder / images / name, picture())
    save(folder / masks / mask, square())


def qata_rows(names: list[str]) -> list[dict[str, str]]:
    text = "Bilateral pulmonary infection, two infected areas, upper left lung and lower right lung."
    return [{"Image": f"mask_{name}", "Description": text} for name in names]


BIMCV = "sub-S09345_ses-E17953_run-1_bp-chest_vp-ap_dx.png"


@pytest.mark.parametrize("place", ["", "Train Set", "Train Set/Text"])
def test_qata_cov19_v2_of_kaggle_with_the_tables_of_lvit(tmp_path: Path, place: str) -> None:
    root = tmp_path / "QaTa-COV19-v2"
    for folder, names in (("Train Set", ["covid_1.png", BIMCV]), ("Test Set", ["covid_2.png"])):
        for name in names:
            pair(root / folder, name, f"mask_{name}", "Images", "Ground-truths")
    table(root / place / "Train_Val_text.xlsx", qata_rows(["covid_1.png", BIMCV]))
    table(root / place / "Train_ID.xlsx", [{"Image": "mask_covid_1.png"}])
    table(root / place / "Val_ID.xlsx", [{"Image": f"mask_{BIMCV}"}])
    table(root / "Test Set" / "Test_text.xlsx", qata_rows(["covid_2.png"]))
    assert detect_layout(root).name == "lvit"
    assert [(record.split, record.subject) for record in load_records(root)] == [
        ("train", "covid_1"), ("val", "sub-S09345"), ("test", "covid_2"),
    ]  # fmt: skip
    assert found(root) == []


def test_mosmeddata_plus_says_that_its_splits_share_studies(tmp_path: Path) -> None:
    names = {
        "Train": ["Jun_coronacases_case1_119.png", "Morozov_study_0255_12.png", "bjorke_1.png"],
        "Val": ["Morozov_study_0255_13.png"],
        "Test": ["Jun_radiopaedia_10_85902_3_case12_107.png", "bjorke_2.png"],
    }
    for split, files in names.items():
        for name in files:
            pair(tmp_path / f"{split}_Folder", name, name)
        rows = [{"Image": name, "Description": "Unilateral pulmonary infection, one infected area."} for name in files]
        table(tmp_path / f"{split}_Folder" / f"{split}_text.xlsx", rows)
    assert [record.subject for record in load_records(tmp_path)] == [
        "Jun_coronacases_case1", "Morozov_study_0255", "bjorke_1", "Morozov_study_0255",
        "Jun_radiopaedia_10_85902_3_case12", "bjorke_2",
    ]  # fmt: skip
    checked = inspect_dataset(tmp_path)
    assert not checked.problems
    assert [(note.kind, note.split, note.name) for note in checked.notes] == [
        ("patient in two splits", "train", "Morozov_study_0255")
    ]


def test_monuseg(tmp_path: Path) -> None:
    """PNG images of the training set, TIFF in colour of the test set, PNG masks of 0 and 255; tables name the masks."""
    colour = np.stack([picture(seed=seed) for seed in range(3)], axis=2)
    for split, name, suffix in (
        ("Train", "TCGA-21-5784-01Z-00-DX1", "png"),
        ("Val", "TCGA-18-5592-01Z-00-DX1", "png"),
        ("Test", "TCGA-2Z-A9J9-01A-01-TS1", "tif"),
    ):
        save(tmp_path / f"{split}_Folder" / "img" / f"{name}.{suffix}", colour)
        save(tmp_path / f"{split}_Folder" / "labelcol" / f"{name}.png", square())
        rows = [{"Image": f"{name}.png", "Description": "The nuclei are evenly distributed."}]
        table(tmp_path / f"{split}_Folder" / f"{split}_text.xlsx", rows)
    records = load_records(tmp_path)
    assert [(record.split, record.subject) for record in records] == [
        ("train", "TCGA-21-5784"), ("val", "TCGA-18-5592"), ("test", "TCGA-2Z-A9J9"),
    ]  # fmt: skip
    assert all(read_image(record.image).shape == (16, 16, 3) and read_truth(record).sum() == 16 for record in records)
    assert found(tmp_path) == []


@pytest.mark.parametrize(
    "columns",
    [
        {"Image": "a.png", "Description": "The left lung.", "Description_2": "Left lung.", "Description_zh": "左肺。"},
        {"description 3": "", "Caption": "The left lung.", "caption 2": "Left lung.", "image_name": "mask_a.png"},
        {"Unnamed: 0": "0", "path": "a.png", "text": "nan", "text1": "The left lung.", "text2": "Left lung."},
    ],
)
def test_headers_and_further_sentences(tmp_path: Path, columns: dict[str, str]) -> None:
    pair(tmp_path / "Train_Folder", "a.png", "mask_a.png")
    table(tmp_path / "Train_Folder" / "Train_text.xlsx", [columns])
    expected = [("train", "a", "The left lung."), ("train", "a__2", "Left lung.")]
    assert texts(load_records(tmp_path)) == expected
    pair(tmp_path / "languide" / "Train", "a.png", "mask_a.png", "Images", "GTs")
    table(tmp_path / "languide" / "prompt" / "test.csv", [columns])
    (tmp_path / "languide" / "Train").rename(tmp_path / "languide" / "Test")
    assert texts(load_records(tmp_path / "languide")) == [("test", *row[1:]) for row in expected]


def test_a_second_row_for_an_image_is_told_where_further_sentences_belong(tmp_path: Path) -> None:
    pair(tmp_path / "Train_Folder", "a.png", "a.png")
    rows = [{"Image": "a.png", "Description": text} for text in ("The left lung.", "Left lung.", "The left lung.")]
    table(tmp_path / "Train_Folder" / "Train_text.xlsx", rows)
    assert [(kind, "Description_2" in detail) for kind, _, detail in found(tmp_path)] == [
        ("duplicate row", True), ("duplicate row", False),
    ]  # fmt: skip


def test_descriptions_in_another_language(tmp_path: Path) -> None:
    pair(tmp_path / "Train_Folder", "a.png", "a.png")
    table(
        tmp_path / "Train_Folder" / "Train_text.xlsx",
        [{"Image": "a.png", "Description": "双侧肺部感染, 两处感染区域。"}],
    )
    assert [record.text for record in load_records(tmp_path)] == ["双侧肺部感染, 两处感染区域。"]
