"""M3D-RefSeg: volumes as they are published and as M3D's own script leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ntpseg.data import inspect_dataset, load_records, read_truth
from ntpseg.importers import IMPORTERS, ImportOptions, import_dataset
from ntpseg.importers.base import Case
from ntpseg.utils.files import read_csv

HEADER = "Image,Mask,Mask_ID,Question_Type,Question,Answer"
CYST, STONE = "A cyst in the left kidney.", "A stone in the right ureter."
ASKED = "Can you segment the cyst, and explain it?"


def labels() -> np.ndarray:
    """NIfTI's [i, j, k] in RAS: label 1 at the right front below, label 3 at the left."""
    values = np.zeros((8, 6, 4), np.uint8)
    values[6:8, 4:6, 0:2] = 1
    values[0:2, 0:3, 3] = 3
    return values


def arrays(root: Path, names: tuple[str, ...] = ("s0000", "s0001")) -> Path:
    """M3D_RefSeg_npy as m3d_refseg_data_prepare.py writes it: [1, k, i, j]."""
    for name in names:
        folder = root / "M3D_RefSeg_npy" / name
        folder.mkdir(parents=True)
        values = labels().transpose(2, 0, 1)[np.newaxis]
        np.save(folder / "ct.npy", values / 3)
        np.save(folder / "mask.npy", values.astype(np.float64))
        (folder / "text.json").write_text(json.dumps({"1": CYST, "3": STONE}), encoding="utf-8")
    return root


def table(root: Path, split: str, *rows: str) -> None:
    (root / f"M3D_RefSeg_{split}.csv").write_text("\n".join((HEADER, *rows)) + "\n", encoding="utf-8")


def row(name: str, value: str = "1", question: str = f'"{ASKED}"', folder: str = "M3D_RefSeg") -> str:
    return f"{folder}/{name}/ct.nii.gz,{folder}/{name}/mask.nii.gz,{value},0,{question},Sure it is [SEG]."


def cases(source: Path, **options) -> list[Case]:
    return IMPORTERS["m3d-refseg"].read(source, ImportOptions(**options))


def test_splits_are_the_tables_and_sentences_are_descriptions_and_questions(tmp_path: Path) -> None:
    arrays(tmp_path)
    table(tmp_path, "train", row("s0000"), row("s0000", "3.0", '"Where is the stone?"'))
    table(tmp_path, "test", row("s0001", folder="."))
    first, second = cases(tmp_path)
    assert [(case.name, case.subject, case.split) for case in (first, second)] == [
        ("s0000", "s0000", "train"), ("s0001", "s0001", "test"),
    ]  # fmt: skip
    said = {structure.parts[0][1]: structure.sentences for structure in first.load().structures}
    assert said == {1: (CYST, ASKED), 3: (STONE, "Where is the stone?")}
    assert {s.parts[0][1]: s.sentences for s in second.load().structures} == {1: (CYST, ASKED), 3: (STONE,)}


def test_arrays_are_turned_to_the_patient(tmp_path: Path) -> None:
    (only,) = cases(arrays(tmp_path, ("s0000",)))
    sample = only.load()
    assert isinstance(sample.image, tuple)
    (volume,) = sample.image
    assert volume.voxels.shape == (4, 6, 8) and not volume.header.spacing_known and only.split == ""
    # Row 0 is the front, column 0 the patient's right: RAS has both at the end of its axes.
    expected = np.zeros((4, 6, 8), np.uint8)
    expected[0:2, 0:2, 0:2] = 1
    expected[3, 3:6, 6:8] = 3
    np.testing.assert_array_equal(sample.labels[0], expected)
    np.testing.assert_allclose(volume.voxels, expected / 3)


def test_one_table_is_a_source(tmp_path: Path) -> None:
    arrays(tmp_path)
    table(tmp_path, "all", row("s0000"), row("s0001"))
    assert [case.split for case in cases(tmp_path / "M3D_RefSeg_all.csv")] == ["", ""]
    table(tmp_path, "test", row("s0001"))
    assert [(case.name, case.split) for case in cases(tmp_path / "M3D_RefSeg_test.csv")] == [("s0001", "test")]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            (row("s0000"), row("s0001", question="")),
            "M3D_RefSeg_train.csv row 3 must have a sentence as Question, got ''",
        ),
        ((row("s0000", "left"),), "row 2 must have the value of a label as Mask_ID, got 'left'"),
        (("ct.nii.gz,mask.nii.gz,1,0,Where?,There.",), "row 2 must name an image such as s0000/ct.nii.gz"),
        ((row("s0000") + ",too many",), "row 2 has 7 fields"),
        (
            (row("s0001"),),
            "M3D_RefSeg_test.csv row 2 must name a volume of one split, got s0001, which is in train",
        ),
    ],
)
def test_faults_of_tables(tmp_path: Path, rows: tuple[str, ...], reason: str) -> None:
    arrays(tmp_path)
    table(tmp_path, "train", *rows)
    table(tmp_path, "test", row("s0001"))
    with pytest.raises(ValueError, match=reason.replace(".", r"\.").replace("[", r"\[")):
        cases(tmp_path)


def test_faults_of_volumes_come_when_their_turn_comes(tmp_path: Path) -> None:
    arrays(tmp_path)
    table(tmp_path, "train", row("s0000"), row("s0001"), row("s0002"))
    (tmp_path / "M3D_RefSeg_npy" / "s0000" / "mask.npy").unlink()
    np.save(tmp_path / "M3D_RefSeg_npy" / "s0001" / "mask.npy", np.zeros((1, 4, 8, 5)))
    found = cases(tmp_path)
    reasons = [
        r"must have mask\.npy beside ct\.npy",
        "must have the shape of ct.npy",
        "must hold the folder s0002 with ct.nii.gz",
    ]
    for case, reason in zip(found, reasons):
        with pytest.raises(ValueError, match=reason):
            case.load()
    with pytest.raises(ValueError, match="source must hold folders such as M3D_RefSeg/s0000"):
        cases(tmp_path / "M3D_RefSeg_npy" / "s0000")


def niftis(root: Path, names: tuple[str, ...] = ("s0000", "s0001")) -> Path:
    """M3D_RefSeg as it is published."""
    affine = np.diag([1.5, 1.5, 3.0, 1.0])
    for name in names:
        folder = root / "M3D_RefSeg" / name
        folder.mkdir(parents=True)
        values = labels()
        nibabel.save(nibabel.Nifti1Image(values.astype(np.int16) * 40 - 100, affine), folder / "ct.nii.gz")
        nibabel.save(nibabel.Nifti1Image(values, affine), folder / "mask.nii.gz")
        (folder / "text.json").write_text(json.dumps({"1": CYST, "3": STONE}), encoding="utf-8")
        (folder / "text_zh.txt").write_text("1：左肾囊肿。\n", encoding="utf-8")  # noqa: RUF001
    return root


def truths(folder: Path) -> dict[tuple[str, str, int, str], np.ndarray]:
    """Masks by split, volume, slice and sentence."""
    return {
        (record.split, record.place.volume, record.place.index, record.text): read_truth(record)
        for record in load_records(folder)
        if record.place is not None
    }


def test_both_forms_become_the_same_slices(tmp_path: Path) -> None:
    for name, make in (("nifti", niftis), ("arrays", arrays)):
        root = make(tmp_path / name)
        table(root, "train", row("s0000"))
        table(root, "test", row("s0001", "3", "Where is the stone?"))
        done = import_dataset("m3d-refseg", root, tmp_path / f"{name}-out")
        assert (done.cases, done.images, done.masks) == (2, 6, 6)
        assert inspect_dataset(tmp_path / f"{name}-out").problems == []
    found = truths(tmp_path / "nifti-out")
    assert list(found) == [
        *[("train", "s0000", index, text) for index in (0, 1) for text in (CYST, ASKED)],
        ("train", "s0000", 3, STONE),
        *[("test", "s0001", index, CYST) for index in (0, 1)],
        *[("test", "s0001", 3, text) for text in (STONE, "Where is the stone?")],
    ]
    np.testing.assert_array_equal(np.argwhere(found["train", "s0000", 0, CYST]), [(0, 0), (0, 1), (1, 0), (1, 1)])
    for key, mask in truths(tmp_path / "arrays-out").items():
        np.testing.assert_array_equal(mask, found[key])
    rows = {name: read_csv(tmp_path / f"{name}-out" / "manifest.csv")[0] for name in ("nifti", "arrays")}
    spacing = {name: [first[key] for key in ("slice_mm", "row_mm", "column_mm")] for name, first in rows.items()}
    assert spacing == {"nifti": ["3", "1.5", "1.5"], "arrays": ["", "", ""]}
    assert rows["nifti"]["modality"] == "CT" and rows["nifti"]["window"] == "soft-tissue"
    # Scaled to 0..1 already: no window of Hounsfield units fits.
    assert ".." in rows["arrays"]["window"] and rows["arrays"]["modality"] == ""


def test_negatives_ask_for_the_lesion_in_slices_that_do_not_show_it(tmp_path: Path) -> None:
    root = niftis(tmp_path, ("s0000",))
    import_dataset("m3d-refseg", root, tmp_path / "out", ImportOptions(negatives=5))
    without = {key[2:] for key, mask in truths(tmp_path / "out").items() if not mask.any()}
    assert without == {(0, STONE), (1, STONE), (3, CYST)}
