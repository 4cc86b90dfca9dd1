"""The three layouts, both naming habits, mixed extensions, foreign names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dataset_files import picture, save, square, table

from ntpseg.data import Record, case_of, check_records, load_records, read_image, read_mask, subject_of
from ntpseg.generation.folder import folder_jobs


def by_case(records: list[Record]) -> dict[str, Record]:
    return {record.case: record for record in records}


def counts(records: list[Record]) -> tuple[int, int, int]:
    splits = [record.split for record in records]
    return splits.count("train"), splits.count("val"), splits.count("test")


@pytest.mark.parametrize(
    ("name", "case"),
    [("a.png", "a"), ("mask_a.png", "a"), ("a.b.TIF", "a.b"), ("mask_1.2.3", "1.2.3"), ("脑.jpeg", "脑"), (" a ", "a")],
)
def test_case_of(name: str, case: str) -> None:
    assert case_of(name) == case


@pytest.mark.parametrize(
    ("case", "subject"),
    [
        ("cxr_s09345-e17953-r1", "cxr_s09345"),
        ("sub-S09345_ses-E17953_run-1_bp-chest_vp-ap_dx", "sub-S09345"),
        ("covid_12", "covid_12"),
        ("cxr_0f89c850e9_left-lung", "cxr_0f89c850e9"),
        ("cxr_abc_left", "cxr_abc_left"),
        ("anything", "anything"),
    ],
)
def test_subject_of(case: str, subject: str) -> None:
    assert subject_of(case) == subject


@pytest.mark.parametrize(
    "names",
    [
        ("x.png", "x.png", "x.png"),
        ("x.png", "mask_x.png", "mask_x.png"),
        ("x.png", "mask_x.png", "x.png"),
        ("x.png", "x.png", "mask_x.png"),
        ("x.tif", "x.png", "x.png"),
        ("x.jpg", "mask_x.png", "mask_x.png"),
        ("x.tif", "x.png", "x"),
        ("Größe 肺.png", "mask_Größe 肺.png", "mask_Größe 肺.png"),
    ],
    ids=str,
)
def test_lvit_naming(lvit: Callable, names: tuple[str, str, str]) -> None:
    (record,) = load_records(lvit({"Train": [names]}))
    assert record.image.name == names[0]
    assert record.mask is not None and record.mask.name == names[1]
    assert (record.split, record.case, record.text) == ("train", case_of(names[0]), f"Text of {names[2]}.")
    assert read_image(record.image).shape == read_mask(record.mask).shape


@pytest.mark.parametrize(
    ("image", "mask", "listed", "hint"),
    [
        ("001.png", "001.png", "1", "is 001.png meant? the table lost the zeros in front"),
        ("a.png", "a.png", "img/a.png", "is a.png meant? write the name without its folder"),
        ("a.png", "a.png", "C:\\data\\a.png", "is a.png meant? write the name without its folder"),
        ("a.png", "a_seg.png", "a.png", "is a_seg.png meant? name it a.png"),
        ("left_12.png", "left_12.png", "lft_12.png", "is left_12.png meant?"),
    ],
)
def test_names_that_do_not_fit_are_told_what_is_there(
    lvit: Callable, tmp_path: Path, image: str, mask: str, listed: str, hint: str
) -> None:
    root = lvit({"Train": [(image, mask, listed)]})
    assert any(hint in problem.detail for problem in check_records(root)), check_records(root)
    texts = tmp_path / "texts.csv"
    texts.write_text(f"image,text\n{listed},The left lung.\n", encoding="utf-8")
    if image == mask and "? " in hint:
        with pytest.raises(ValueError, match=re.escape(hint)):
            folder_jobs(root / "Train_Folder" / "img", None, texts)


def test_table_and_file_names_in_different_unicode_forms(lvit: Callable) -> None:
    composed, split = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    assert composed != split
    (record,) = load_records(lvit({"Train": [(split, split, composed)]}))
    assert record.case == case_of(composed)


def test_lvit_splits_and_order(good: Path) -> None:
    records = load_records(good)
    assert counts(records) == (2, 0, 1)
    assert [record.case for record in records] == ["a", "b", "c"]


def test_subject_column_has_precedence(good: Path) -> None:
    rows = [{"Image": f"mask_{name}.png", "Description": "T.", "Subject": "p1"} for name in "ab"]
    table(good / "Train_Folder" / "Train_text.xlsx", rows)
    assert {record.subject for record in load_records(good) if record.split == "train"} == {"p1"}


@pytest.mark.parametrize("place", ["", "Train_Folder"])
@pytest.mark.parametrize("images", ["one folder", "two folders"])
def test_train_val_table_with_id_lists(tmp_path: Path, place: str, images: str) -> None:
    root = tmp_path / "set"
    names = [f"{i}" for i in range(5)]
    for name in names:
        folder = "Val_Folder" if images == "two folders" and name in "34" else "Train_Folder"
        save(root / folder / "img" / f"{name}.png", picture())
        save(root / folder / "labelcol" / f"mask_{name}.png", square())
    rows = [{"Image": f"mask_{name}.png", "Description": f"Text {name}."} for name in names]
    table(root / place / "Train_Val_text.xlsx", rows)
    table(root / place / "Train_ID.xlsx", [{"Image": f"mask_{name}.png"} for name in "012"])
    table(root / place / "Val_ID.xlsx", [{"Image": f"mask_{name}.png"} for name in "34"])
    records = load_records(root)
    assert {record.case: record.split for record in records} == dict(zip(names, ["train"] * 3 + ["val"] * 2))
    assert all(record.text == f"Text {record.case}." for record in records)


def test_train_val_table_without_id_lists_goes_by_folder(lvit: Callable) -> None:
    root = lvit({"Train": [("a.png", "a.png", "a.png")], "Val": [("b.png", "b.png", "b.png")]})
    for split in ("Train", "Val"):
        (root / f"{split}_Folder" / f"{split}_text.xlsx").unlink()
    table(root / "Train_Val_text.xlsx", [{"Image": f"{name}.png", "Description": "T."} for name in "ab"])
    assert {record.case: record.split for record in load_records(root)} == {"a": "train", "b": "val"}


def languide(root: Path, masks: str, folders: dict[str, str], val: bool) -> Path:
    names = {"train": [f"t{i}" for i in range(10)], "test": ["e0", "e1"]} | ({"val": ["v0"]} if val else {})
    for split, cases in names.items():
        for name in cases:
            save(root / folders[split] / "Images" / f"{name}.png", picture())
            save(root / folders[split] / masks / f"mask_{name}.png", square())
        rows = [{"Image": f"mask_{name}.png", "Description": f"Text {name}."} for name in cases]
        table(root / "prompt" / f"{split}.csv", rows)
    return root


@pytest.mark.parametrize("masks", ["GTs", "Ground-truths"])
@pytest.mark.parametrize(
    "folders",
    [
        {"train": "Train", "test": "Test"},
        {"train": "Train Set", "test": "Test Set"},
        {"train": "Train_Folder", "test": "Test_Folder"},
        {"train": "", "test": ""},
    ],
    ids=lambda folders: folders["train"] or "flat",
)
def test_languide(tmp_path: Path, masks: str, folders: dict[str, str]) -> None:
    records = load_records(languide(tmp_path / "set", masks, folders, val=False))
    assert counts(records) == (8, 2, 2)
    # The last fifth of train.csv, as in LanGuideMedSeg's own code.
    assert [record.case for record in records if record.split == "val"] == ["t8", "t9"]
    assert all(record.text == f"Text {record.case}." for record in records)
    assert all(record.mask is not None and record.mask.parent.name == masks for record in records)


def test_languide_with_its_own_val_table(tmp_path: Path) -> None:
    folders = {"train": "train", "val": "val", "test": "test"}
    assert counts(load_records(languide(tmp_path / "set", "GTs", folders, val=True))) == (10, 1, 2)


def manifest(root: Path, rows: list[dict[str, str]], name: str = "manifest.csv") -> Path:
    for row in rows:
        for kind, pixels in (("image", picture()), ("mask", square())):
            save(root / row[kind], pixels)
    return table(root / name, rows)


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.xlsx", "other.csv"])
def test_manifest_with_splits(tmp_path: Path, name: str) -> None:
    rows = [
        {"image": "i/a.tif", "mask": "m/a.png", "text": "Ä, quoted.", "split": "train", "subject": "p"},
        {"image": "i/b.tif", "mask": "m/b.png", "text": "B.", "split": "validation", "subject": "q"},
        {"image": "i/c.tif", "mask": "m/c.png", "text": "C.", "split": "test", "subject": "r"},
    ]
    path = manifest(tmp_path, rows, name)
    records = load_records(path)
    assert records == load_records(tmp_path)
    assert [(r.case, r.split, r.subject, r.text) for r in records] == [
        ("a", "train", "p", "Ä, quoted."), ("b", "val", "q", "B."), ("c", "test", "r", "C."),
    ]  # fmt: skip
    assert (records[0].image, records[0].mask) == (tmp_path / "i/a.tif", tmp_path / "m/a.png")


def test_manifest_with_aliases_byte_order_mark_and_absolute_paths(tmp_path: Path) -> None:
    image, mask = save(tmp_path / "x" / "a.png", picture()), save(tmp_path / "y" / "a.png", square())
    (tmp_path / "list.csv").write_text(f"Image,Mask,Caption,Split\n{image},{mask},T.,train\n", encoding="utf-8-sig")
    (record,) = load_records(tmp_path / "list.csv")
    assert (record.image, record.mask, record.text) == (image, mask, "T.")


def test_manifest_with_other_unicode_form_and_backslashes(tmp_path: Path) -> None:
    composed, split = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    image, mask = save(tmp_path / "x" / split, picture()), save(tmp_path / "y" / split, square())
    table(
        tmp_path / "manifest.csv", [{"image": f"x\\{composed}", "mask": f"y/{composed}", "text": "T.", "split": "val"}]
    )
    (record,) = load_records(tmp_path)
    assert (record.image, record.mask, record.case) == (image, mask, case_of(composed))


def test_manifest_without_splits_keeps_subjects_together(tmp_path: Path) -> None:
    rows = [
        {"image": f"{i}.png", "mask": f"{i}_{part}.png", "text": f"Part {part}."} for i in range(20) for part in "ab"
    ]
    records = load_records(manifest(tmp_path, rows))
    assert counts(records) == (28, 6, 6)
    splits: dict[Path, set[str]] = {}
    for record in records:
        splits.setdefault(record.image, set()).add(record.split)
    assert all(len(found) == 1 for found in splits.values())
    assert len({record.case for record in records}) == len(records)
    assert {record.case: record.split for record in records} == {r.case: r.split for r in load_records(tmp_path)}


def test_manifest_of_three_subjects_fills_every_split(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "mask": f"m{i}.png", "text": "T."} for i in range(3)]
    assert counts(load_records(manifest(tmp_path, rows))) == (1, 1, 1)


def test_manifest_cases_are_unique(tmp_path: Path) -> None:
    rows = [
        {"image": "p1/x.png", "mask": "p1/m.png", "text": "T."},
        {"image": "p2/x.png", "mask": "p2/m.png", "text": "T."},
        {"image": "p2/x.png", "mask": "p2/n.png", "text": "T."},
        {"image": "p2/x.png", "mask": "p2/n.png", "text": "Other words for the same."},
        {"image": "y.png", "mask": "n.png", "text": "T."},
    ]
    rows = [row | {"split": "train"} for row in rows]
    cases = [record.case for record in load_records(manifest(tmp_path, rows))]
    assert cases[:3] == ["p1__x", "p2__x__m", cases[2]] and cases[4] == "y"
    # Two sentences for one mask: the name goes on with a digest of the sentence.
    assert all(re.fullmatch("p2__x__n__[0-9a-f]{6}", case) for case in cases[2:4])
    assert len(set(cases)) == 5


def test_unknown_layouts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have one of the known layouts"):
        load_records(tmp_path)
    with pytest.raises(ValueError, match=r"layout must be one of .* got 'coco'"):
        load_records(tmp_path, "coco")
    with pytest.raises(FileNotFoundError):
        load_records(tmp_path / "none")
    for layout, needed in (("lvit", "Train_Folder"), ("languide", "prompt"), ("manifest", r"manifest\.csv")):
        with pytest.raises(ValueError, match=needed):
            load_records(tmp_path, layout)


@pytest.mark.parametrize("deeper", ["QaTa", "archive/QaTa"])
def test_a_data_set_in_a_folder_of_its_own_is_found_and_named(lvit: Callable, tmp_path: Path, deeper: str) -> None:
    root = lvit({"train": [("a.png", "a.png", "The left lung.")]})
    outer = tmp_path / "unpacked"
    (outer / deeper).parent.mkdir(parents=True)
    root.rename(outer / deeper)
    with pytest.raises(ValueError, match=re.escape(f"{outer / deeper} has one: give that")):
        load_records(outer)


def test_manifest_without_the_needed_columns(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("image,mask\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must have the column text, got image, mask"):
        load_records(tmp_path)


@pytest.mark.data
def test_real_xrays(shared_data: Path) -> None:
    records = load_records(shared_data / "cxr_referring")
    assert counts(records) == (272, 60, 58)
    subjects = {split: {r.subject for r in records if r.split == split} for split in ("train", "val", "test")}
    assert not subjects["train"] & subjects["test"] and not subjects["train"] & subjects["val"]
    assert sum(len(found) for found in subjects.values()) < len(records) / 3
    sides = {r.text: read_mask(r.mask) for r in records[:5] if r.mask and r.text.endswith("lung.")}
    columns = {text: np.argwhere(mask)[:, 1].mean() for text, mask in sides.items()}
    # The patient's left is on the image's right.
    assert columns["The right lung."] < columns["The left lung."]
