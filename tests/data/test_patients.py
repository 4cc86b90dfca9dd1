"""No patient in two splits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from dataset_files import picture, save, square, table
from test_slice_columns import PLACE, manifest
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.data import DataProblems, inspect_dataset, load_records, usable_records

KIND = "patient in two splits"


def test_a_stated_patient_in_two_splits_is_an_error(tmp_path: Path) -> None:
    """Without the bad pairs the test split stays whole, and nobody in it is trained on."""
    owners = ["p1", "p1", "p1", "p1", "p2", "p3", "p3"]
    splits = ["train", "train", "val", "test", "train", "train", "val"]
    path = manifest(tmp_path, [{"subject": s, "split": split} for s, split in zip(owners, splits)])
    with pytest.raises(DataProblems) as caught:
        load_records(path)
    found = [(p.kind, p.split, p.name, p.detail) for p in caught.value.problems]
    cure = "; put all of a patient into one split"
    assert found == [
        (KIND, "train", "p1", f"2 of its pairs are in train, 1 in test{cure}"),
        (KIND, "val", "p1", f"1 of its pairs is in val, 1 in test{cure}"),
        (KIND, "train", "p3", f"1 of its pairs is in train, 1 in val{cure}"),
    ]
    records, problems = usable_records(path, skip_bad=True)
    assert [(r.subject, r.split) for r in records] == [("p2", "train"), ("p3", "val"), ("p1", "test")]
    assert len(problems) == 3


def test_a_volume_in_two_splits_is_an_error(tmp_path: Path) -> None:
    rows = [PLACE | {"slice": str(n), "split": split} for n, split in enumerate(("train", "train", "test"))]
    path = manifest(tmp_path, rows)
    assert [p.kind for p in inspect_dataset(path).problems] == [KIND]
    result = CliRunner().invoke(app, ["data", "check", str(path)])
    assert result.exit_code == 1 and KIND in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("alias", ["", "symlink", "hardlink", "spelling"])
def test_an_image_in_two_splits_is_an_error_whatever_its_subjects(tmp_path: Path, alias: str) -> None:
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.png", picture())
        save(tmp_path / "masks" / f"{name}.png", square())
    other = {"": "images/a.png", "spelling": "images/../images/a.png"}.get(alias, "images/z.png")
    if alias == "symlink":
        (tmp_path / other).symlink_to("a.png")
    elif alias == "hardlink":
        (tmp_path / other).hardlink_to(tmp_path / "images" / "a.png")
    rows = [("images/a.png", "a", "train", text) for text in ("One.", "Two.")]
    rows += [(other, "a", "test", "Three."), *(("images/b.png", "b", "val", text) for text in ("One.", "Two."))]
    cells = [
        {"image": image, "mask": f"masks/{mask}.png", "text": text, "split": split, "subject": f"p{number}"}
        for number, (image, mask, split, text) in enumerate(rows)
    ]
    path = table(tmp_path / "manifest.csv", cells)
    [problem] = inspect_dataset(path).problems
    assert (problem.kind, problem.split, problem.name) == ("image in two splits", "train", "images/a.png")
    alias = f" as {other}" if other != "images/a.png" else ""
    assert problem.detail == f"2 of its pairs are in train, 1 in test{alias}; put all of an image into one split"
    records, _ = usable_records(path, skip_bad=True)
    assert sorted(record.split for record in records) == ["test", "val", "val"]


def test_folders_that_share_a_linked_image_are_an_error(lvit) -> None:
    root = lvit({"Train": [("a.png", "a.png", "a.png")], "Test": [("b.png", "b.png", "b.png")]})
    (root / "Test_Folder" / "img" / "b.png").unlink()
    (root / "Test_Folder" / "img" / "b.png").symlink_to(root / "Train_Folder" / "img" / "a.png")
    assert [(p.kind, p.split) for p in inspect_dataset(root).problems] == [("image in two splits", "train")]


def test_one_sentence_for_two_masks_is_a_note(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture())
    for name in ("m", "n", "o"):
        save(tmp_path / f"{name}.png", square())
    rows = [("m", "A spot."), ("n", "a  spot."), ("o", "Another."), ("m", "The spot.")]
    cells = [{"image": "a.png", "mask": f"{mask}.png", "text": text, "split": "train"} for mask, text in rows]
    checked = inspect_dataset(table(tmp_path / "manifest.csv", cells))
    assert not checked.problems and len(checked.records) == 4
    notes = [note for note in checked.notes if note.kind == "sentence for two masks"]
    assert [(n.split, n.name, n.detail) for n in notes] == [
        ("train", "a.png", "'A spot.' is said of m.png and of n.png")
    ]


def test_training_refuses_it(tmp_path: Path) -> None:
    path = manifest(tmp_path, [{"subject": "p1", "split": split} for split in ("train", "test")])
    result = CliRunner().invoke(app, ["train", "tiny", f"data.path={path}", f"output={tmp_path / 'run'}"])
    assert result.exit_code != 0
    assert KIND in str(result.output) + str(result.exception)


def test_a_column_of_subjects_in_another_layout(lvit) -> None:
    root = lvit({"Train": [("a.png", "a.png", "a.png")], "Test": [("b.png", "b.png", "b.png")]})
    for split, name in (("Train", "a.png"), ("Test", "b.png")):
        rows = [{"Image": name, "Description": "The lung.", "Subject": "p1"}]
        table(root / f"{split}_Folder" / f"{split}_text.xlsx", rows)
    assert [(p.kind, p.split) for p in inspect_dataset(root).problems] == [(KIND, "train")]


def test_names_alone_give_a_note(lvit) -> None:
    names = {"Train": "sub-S1_ses-E1_a.png", "Test": "sub-S1_ses-E2_b.png"}
    root = lvit({split: [(name, name, name)] for split, name in names.items()})
    checked = inspect_dataset(root)
    assert checked.problems == [] and len(checked.records) == 2
    [note] = checked.notes
    assert (note.kind, note.split, note.name) == (KIND, "train", "sub-S1")
    assert note.detail == "by the names of cases, 1 subject is in train and in test; a column subject decides"


@pytest.mark.parametrize(
    ("image", "subject"),
    [
        ("files/p10/p10000032/s50414267/02aa804e.png", "p10000032"),
        ("mimic/p10000032_s50414267_02aa804e.png", "p10000032"),
        ("train/patient00001/study1/view1_frontal.png", "patient00001"),
        ("bids/sub-01/ses-1/anat/slice_3.png", "sub-01"),
        ("bids/sub-01/ses-1/anat/sub-01_ses-1_ct_3.png", "sub-01"),
        ("p10/s50414267/02aa804e.png", "p10__s50414267__02aa804e"),
    ],
)
def test_folders_and_names_that_tell_the_patient(tmp_path: Path, image: str, subject: str) -> None:
    save(tmp_path / image, picture())
    save(tmp_path / "m.png", square())
    path = table(tmp_path / "manifest.csv", [{"image": image, "mask": "m.png", "text": "A lung.", "split": "train"}])
    assert [record.subject for record in load_records(path)] == [subject]
    shutil.rmtree(tmp_path)
