"""Every fault is found, named, and either refused or left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dataset_files import picture, save, square, table
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.data import DataProblems, check_records, load_records, problem_table, usable_records

run = CliRunner()


def train(root: Path, kind: str, name: str) -> Path:
    return root / "Train_Folder" / kind / name


def unreadable_image(root: Path) -> None:
    train(root, "img", "a.png").write_bytes(b"junk")


def unreadable_mask(root: Path) -> None:
    train(root, "labelcol", "mask_a.png").write_bytes(train(root, "labelcol", "mask_a.png").read_bytes()[:40])


def missing_mask(root: Path) -> None:
    train(root, "labelcol", "mask_a.png").unlink()


def missing_image(root: Path) -> None:
    train(root, "img", "a.png").unlink()
    train(root, "labelcol", "mask_a.png").unlink()


def stray_mask(root: Path) -> None:
    save(train(root, "labelcol", "mask_z.png"), square())


def stray_image(root: Path) -> None:
    save(train(root, "img", "z.png"), picture())


def size_mismatch(root: Path) -> None:
    save(train(root, "labelcol", "mask_a.png"), square(12))


def empty_mask(root: Path) -> None:
    save(train(root, "labelcol", "mask_a.png"), np.zeros((16, 16), np.uint8))


def rows(root: Path, *names: tuple[str, str]) -> None:
    table(root / "Train_Folder" / "Train_text.xlsx", [{"Image": name, "Description": text} for name, text in names])


def duplicate_row(root: Path) -> None:
    rows(root, ("mask_a.png", "A."), ("mask_b.png", "B."), ("mask_b.png", "Again."))


def empty_caption(root: Path) -> None:
    rows(root, ("mask_a.png", ""), ("mask_b.png", "B."))


def row_without_image(root: Path) -> None:
    rows(root, ("mask_a.png", "A."), ("", "Nobody's."), ("mask_b.png", "B."))


def twin_files(root: Path) -> None:
    save(train(root, "img", "a.jpg"), picture())


def missing_table(root: Path) -> None:
    (root / "Train_Folder" / "Train_text.xlsx").unlink()


def broken_table(root: Path) -> None:
    (root / "Train_Folder" / "Train_text.xlsx").write_bytes(b"PK junk")


def table_without_column(root: Path) -> None:
    table(root / "Train_Folder" / "Train_text.xlsx", [{"Image": "mask_a.png", "Note": "A."}])


# what is done to a faultless set of two training pairs; kind, file and words of the one problem; training pairs left
FAULTS = [
    (unreadable_image, "unreadable file", "Train_Folder/img/a.png", "cannot identify", 1),
    (unreadable_mask, "unreadable file", "Train_Folder/labelcol/mask_a.png", "", 1),
    (missing_mask, "missing mask", "Train_Folder/img/a.png", "no mask of this name in Train_Folder/labelcol", 1),
    (missing_image, "caption without image", "mask_a.png", "no such image", 1),
    (stray_mask, "mask without image", "Train_Folder/labelcol/mask_z.png", "no image", 2),
    (stray_image, "image without caption", "Train_Folder/img/z.png", "no table has a row", 2),
    (
        size_mismatch,
        "size mismatch",
        "Train_Folder/labelcol/mask_a.png",
        "the mask has 12x12 pixels, its image 16x16",
        1,
    ),
    (empty_mask, "empty mask", "Train_Folder/labelcol/mask_a.png", "no pixel is foreground", 1),
    (duplicate_row, "duplicate row", "mask_b.png", "more than once", 2),
    (empty_caption, "image without caption", "Train_Folder/img/a.png", "its caption is empty", 1),
    (row_without_image, "caption without image", "row 3 of the train rows", "its image is empty", 2),
    (twin_files, "duplicate row", "Train_Folder/img/a.png", "a.jpg has the same name", 2),
    (missing_table, "missing table", "Train_Folder", "Train_text.xlsx", 0),
]


@pytest.mark.parametrize(
    ("fault", "kind", "name", "words", "left"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS]
)
def test_fault(good: Path, fault: Callable[[Path], None], kind: str, name: str, words: str, left: int) -> None:
    assert check_records(good) == []
    fault(good)
    (problem,) = check_records(good)
    assert (problem.kind, problem.split, problem.name) == (kind, "train", name)
    assert words in problem.detail

    with pytest.raises(DataProblems) as refused:
        usable_records(good)
    assert refused.value.problems == [problem]
    assert kind in str(refused.value) and "--skip-bad" in str(refused.value)

    records, left_out = usable_records(good, skip_bad=True)
    assert left_out == [problem]
    assert sum(record.split == "train" for record in records) == left

    shown = run.invoke(app, ["data", "check", str(good)])
    assert shown.exit_code == 1
    assert kind in shown.output and name in shown.output.replace("\n", "") and f"1 {kind}" in shown.output


@pytest.mark.parametrize(
    ("fault", "words"),
    [(broken_table, ""), (table_without_column, "must have the column description, got image, note")],
)
def test_broken_table(good: Path, fault: Callable[[Path], None], words: str) -> None:
    fault(good)
    kinds = {problem.kind: problem for problem in check_records(good)}
    assert kinds["unreadable file"].name == "Train_Folder/Train_text.xlsx"
    assert words in kinds["unreadable file"].detail


def test_several_faults_are_one_table(good: Path) -> None:
    unreadable_image(good)
    stray_mask(good)
    save(train(good, "labelcol", "mask_b.png"), np.zeros((8, 8), np.uint8))
    kinds = sorted(problem.kind for problem in check_records(good))
    assert kinds == ["empty mask", "mask without image", "size mismatch", "unreadable file"]
    output = run.invoke(app, ["data", "check", str(good)]).output
    assert all(kind in output for kind in kinds)
    assert output.count("What is wrong with") == 1


def test_check_of_good_data(good: Path) -> None:
    shown = run.invoke(app, ["data", "check", str(good)])
    assert shown.exit_code == 0, shown.output
    assert "3 usable pairs; 0 problems" in shown.output


def test_loading_alone_refuses_what_tables_and_folders_tell(good: Path) -> None:
    missing_mask(good)
    with pytest.raises(DataProblems, match="missing mask"):
        load_records(good)
    assert [record.case for record in load_records(good, skip_bad=True)] == ["b", "c"]


def test_nothing_usable_is_an_error_even_with_skip_bad(good: Path) -> None:
    for mask in good.glob("*/labelcol/*"):
        mask.unlink()
    with pytest.raises(ValueError, match=r"must hold at least one usable pair .* got none"):
        usable_records(good, skip_bad=True)


def test_rows_that_no_id_list_has(good: Path) -> None:
    (good / "Train_Folder" / "Train_text.xlsx").unlink()
    table(good / "Train_Val_text.xlsx", [{"Image": f"mask_{name}.png", "Description": "T."} for name in "ab"])
    table(good / "Train_ID.xlsx", [{"Image": "mask_a.png"}])
    kinds = {problem.kind: problem.name for problem in check_records(good)}
    assert kinds == {"row in no split": "mask_b.png", "image without caption": "Train_Folder/img/b.png"}


def test_case_in_both_id_lists_counts_in_train(good: Path) -> None:
    (good / "Train_Folder" / "Train_text.xlsx").unlink()
    table(good / "Train_Val_text.xlsx", [{"Image": f"mask_{name}.png", "Description": "T."} for name in "ab"])
    for split in ("Train", "Val"):
        table(
            good / f"{split}_ID.xlsx", [{"Image": f"mask_{name}.png"} for name in "ab"[: 2 if split == "Train" else 1]]
        )
    (problem,) = check_records(good)
    assert (problem.kind, problem.name) == ("duplicate row", "mask_a.png")
    assert [r.split for r in load_records(good, skip_bad=True) if r.case == "a"] == ["train"]


MANIFEST_FAULTS = [
    ({"image": "none.png"}, "caption without image", "no such image"),
    ({"mask": "none.png"}, "missing mask", "there is no none.png"),
    ({"mask": ""}, "missing mask", "its mask is empty"),
    ({"text": ""}, "image without caption", "its text is empty"),
    ({"split": "later"}, "row in no split", "'later'"),
    ({"image": "b.png", "mask": "b_m.png", "text": "Tb."}, "duplicate row", "the same as row 2"),
]


@pytest.mark.parametrize(("change", "kind", "words"), MANIFEST_FAULTS, ids=[fault[1] for fault in MANIFEST_FAULTS])
def test_manifest_faults(tmp_path: Path, change: dict[str, str], kind: str, words: str) -> None:
    lines = []
    for name in "ba":
        save(tmp_path / f"{name}.png", picture())
        save(tmp_path / f"{name}_m.png", square())
        lines.append({"image": f"{name}.png", "mask": f"{name}_m.png", "text": f"T{name}.", "split": "train"})
    lines[1] |= change
    table(tmp_path / "manifest.csv", lines)
    (problem,) = check_records(tmp_path)
    assert problem.kind == kind and words in problem.detail
    assert problem.name.startswith("manifest.csv:3 ")
    assert [record.case for record in load_records(tmp_path, skip_bad=True)] == ["b"]


def test_long_tables_are_cut_in_errors_but_not_by_check(lvit: Callable) -> None:
    names = [(f"{i:03d}.png", f"{i:03d}.png", f"{i:03d}.png") for i in range(70)]
    root = lvit({"Train": names})
    for mask in (root / "Train_Folder" / "labelcol").iterdir():
        mask.unlink()
    with pytest.raises(DataProblems) as refused:
        load_records(root)
    assert "70 problems: 70 missing mask" in str(refused.value)
    assert "and 20 more" in str(refused.value)
    assert problem_table(refused.value.problems, title="").row_count == 70
    assert run.invoke(app, ["data", "check", str(root)]).output.count("missing mask") == 71


def test_names_with_markup_are_shown_as_they_are(good: Path) -> None:
    save(train(good, "img", "[bold]x.png"), picture())
    assert "[bold]x.png" in run.invoke(app, ["data", "check", str(good)]).output


@pytest.mark.data
def test_real_xrays_have_no_fault(shared_data: Path) -> None:
    assert check_records(shared_data / "cxr_referring") == []


@pytest.mark.parametrize(("kind", "told"), [("link", "a link to nothing"), ("folder", "a folder")])
@pytest.mark.parametrize("layout", ["manifest", "lvit", "medvlsm"])
def test_what_has_a_files_name_and_is_none_is_told(tmp_path: Path, layout: str, kind: str, told: str) -> None:
    images, masks = ("Train_Folder/img", "Train_Folder/labelcol") if layout == "lvit" else ("images", "masks")
    save(tmp_path / images / "b.png", picture())
    for name in ("a", "b"):
        save(tmp_path / masks / f"{name}.png", square())
    odd = tmp_path / images / "a.png"
    if kind == "link":
        odd.symlink_to(tmp_path / "nowhere.png")
    else:
        odd.mkdir()
    names = [{"image": f"{images}/{n}.png", "mask": f"{masks}/{n}.png", "text": "T.", "split": "train"} for n in "ab"]
    if layout == "manifest":
        table(tmp_path / "manifest.csv", names)
    elif layout == "lvit":
        rows = [{"Image": f"{n}.png", "Description": "T."} for n in "ab"]
        table(tmp_path / "Train_Folder" / "Train_text.csv", rows)
    else:
        entries = [{"img_name": f"{n}.png", "mask_name": f"{n}.png", "prompts": {"p1": "T."}} for n in "ab"]
        (tmp_path / "anns").mkdir()
        for split in ("train", "val", "test"):
            (tmp_path / "anns" / f"{split}.json").write_text(json.dumps(entries if split == "train" else []))
    [problem] = [p for p in check_records(tmp_path, layout) if p.kind == "caption without image"]
    assert problem.detail.endswith(f"; what has this name is {told}"), problem
