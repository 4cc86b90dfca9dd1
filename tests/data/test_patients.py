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
