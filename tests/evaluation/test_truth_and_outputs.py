"""``ntpseg eval`` checks its truth as training does, keeps cases without a finding, replaces nothing but results."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_segmenter import TEXTS, shared, write_dataset, write_manifest
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.data import Record
from ntpseg.evaluation import EvaluationOptions, evaluate, segmentation_metrics
from ntpseg.evaluation.result import file_names
from ntpseg.evaluation.run_directory import data_of
from ntpseg.evaluation.summary import summarise_findings
from ntpseg.evaluation.tables import finding_rows
from ntpseg.generation import Segmenter
from ntpseg.training.config import dump_config, load_config
from ntpseg.utils.files import read_csv
from ntpseg.volumes.windows import PERCENTILES


def invoke(*arguments: object) -> Any:
    fast = ["--text-check", "0"] if "eval" in arguments else []
    return CliRunner().invoke(app, [*map(str, arguments), *fast], env={"COLUMNS": "160"})


def refused(*arguments: object) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, ValueError), (result.output, result.exception)
    return str(result.exception)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segmenter, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, list[Record]]:
    """A manifest of four test cases, all with a finding."""
    records = [r for r in write_dataset(tmp_path / "data", 12) if r.split == "test" and r.text != TEXTS[2]][:4]
    write_manifest(tmp_path / "data" / "m.csv", records)
    return tmp_path / "data" / "m.csv", records


def test_cases_without_a_finding_are_a_group_with_its_own_figures() -> None:
    side = 10
    truth, prediction = np.zeros((2, 5, side, side), bool)
    truth[:2, :2] = True
    prediction[0, :2] = True  # found; the second is missed
    prediction[3, :5, :4] = True  # a false alarm of 20 pixels; the third and fifth are rightly empty
    per_case = segmentation_metrics(prediction, truth)
    result = summarise_findings(per_case, np.full(5, side * side), ["a", "b", "c", "d", "e"])
    assert per_case["dice"].tolist() == [1, 0, 1, 0, 1] and result["convention"].startswith("Dice of a case without")
    assert result["with"]["cases"] == 2 and result["with"]["missed"] == 1
    assert result["with"]["per_image"]["dice"]["value"] == pytest.approx(0.5)
    without = result["without"]
    assert (without["cases"], without["false_positives"]) == (3, 1)
    assert without["specificity"]["value"] == pytest.approx(2 / 3)
    assert without["false_positive_area"]["value"] == pytest.approx(0.2 / 3)
    rows = dict(finding_rows({"findings": result}))
    assert "1 missed" in rows["2 with a finding: Dice"] and "1 of 3 not empty" in rows["3 without: specificity"]
    assert "6.667" in rows["3 without: area predicted"]


def test_a_split_of_one_kind_has_one_group() -> None:
    mask = np.ones((1, 4, 4), bool)
    full = summarise_findings(segmentation_metrics(mask, mask), np.array([16]), ["a"])
    empty = summarise_findings(segmentation_metrics(mask, ~mask), np.array([16]), ["a"])
    assert full["without"] is None and full["with"]["cases"] == 1 and finding_rows({"findings": full}) == []
    assert empty["with"] is None and empty["without"]["specificity"]["value"] == 0
    assert len(finding_rows({"findings": empty})) == 2 and finding_rows({}) == []


def test_the_command_keeps_and_reports_them(dataset: tuple[Path, list[Record]], tmp_path: Path) -> None:
    manifest, records = dataset
    Image.fromarray(np.zeros_like(np.asarray(Image.open(records[0].mask)))).save(records[0].mask)  # type: ignore[arg-type]
    out = tmp_path / "out"
    result = invoke("eval", "--model", shared()[2], "--data", manifest, "--out", out)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    findings = summary["findings"]
    assert summary["cases"] == 4 and findings["with"]["cases"] == 3 and findings["without"]["cases"] == 1
    mask = np.asarray(Image.open(next((out / "masks").glob(f"{file_names([records[0].case])[0]}.png")))) > 0
    assert findings["without"]["false_positive_area"]["value"] == pytest.approx(mask.mean())
    assert findings["without"]["specificity"]["value"] == float(not mask.any())
    assert "1 without: specificity" in result.output


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("fault", ["size", "unreadable", "image"])
def test_the_truth_is_checked_before_decoding(dataset: tuple[Path, list[Record]], fault: str) -> None:
    manifest, records = dataset
    mask: Any = records[1].mask
    if fault == "size":
        Image.open(mask).resize((30, 20)).save(mask)
    else:
        (mask if fault == "unreadable" else records[1].image).write_bytes(b"no image")
    message = refused("eval", "--model", shared()[2], "--data", manifest)
    assert records[1].image.name in message and ("30x20" if fault == "size" else "unreadable") in message


def test_bad_cases_can_be_left_out(dataset: tuple[Path, list[Record]], tmp_path: Path) -> None:
    manifest, records = dataset
    Image.open(records[1].mask).resize((30, 20)).save(records[1].mask)  # type: ignore[arg-type]
    result = invoke("eval", "--model", shared()[2], "--data", manifest, "--out", tmp_path / "out", "--skip-bad")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["cases"] == 3
    assert "30x20" in result.stderr


def test_a_class_of_label_maps_is_chosen_and_windows_are_recorded(
    dataset: tuple[Path, list[Record]], tmp_path: Path
) -> None:
    manifest, records = dataset
    for record in records:
        labels = np.zeros_like(np.asarray(Image.open(record.mask)))  # type: ignore[arg-type]
        labels[:8, :8], labels[10:20, :8] = 1, 2
        Image.fromarray(labels).save(record.mask)  # type: ignore[arg-type]
    deep = np.asarray(Image.open(records[0].image).convert("L")).astype(np.uint16) * 16
    Image.fromarray(deep).save(records[0].image)
    common = ("eval", "--model", shared()[2], "--data", manifest, "--out", tmp_path / "out")
    assert "several classes" in refused(*common)
    result = invoke(*common, "--mask-value", "2")
    assert result.exit_code == 0, result.output
    rows = {row["case"]: row for row in read_csv(tmp_path / "out" / "cases.csv")}
    for record in records:
        row = rows[record.case]
        assert int(row["true"]) == 80, "the pixels of class 2"
        assert (row["window"] == "") == (record is not records[0])
    low, high = map(float, rows[records[0].case]["window"].split(".."))
    assert (low, high) == tuple(np.percentile(deep, PERCENTILES))


def test_the_function_refuses_a_mask_of_another_size(dataset: tuple[Path, list[Record]]) -> None:
    _, records = dataset
    Image.open(records[1].mask).resize((30, 20)).save(records[1].mask)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"masks must have their image's size, .*, got \[20, 30\] in .*" + records[1].case
    ):
        evaluate(Segmenter(shared()[1]), records, EvaluationOptions(text_check=0))


def test_a_relative_data_path_works_from_anywhere(
    dataset: tuple[Path, list[Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(shared()[2], run)
    monkeypatch.chdir(tmp_path)
    (run / "config.yaml").write_text(dump_config(load_config("tiny", ["data.path=data/m.csv"])))
    monkeypatch.chdir("/")
    assert data_of(run) == (dataset[0], "auto")
    result = invoke("eval", "--model", run)
    assert result.exit_code == 0 and (run / "eval" / "test" / "summary.json").is_file(), result.output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("data: {path: gone}", "is gone, got gone, seen from"),
        ("data: {path: /gone}", "is gone, got /gone"),
        ("data: {path: '${oc.env:NTPSEG_NOT_SET}'}", "NTPSEG_NOT_SET"),
        ("data: [", "cannot be read"),
        ("- a", "cannot be read"),
        ("", "no data.path"),
    ],
)
def test_a_run_whose_data_cannot_be_found_says_so(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="--data must name the data set") as caught:
        data_of(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_decoding")
def test_results_replace_nothing_that_is_read(dataset: tuple[Path, list[Record]], tmp_path: Path) -> None:
    manifest, records = dataset
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    moved = []
    for record in records:
        image, mask = folder / "images" / record.image.name, folder / "masks" / record.image.name
        mask.parent.mkdir(exist_ok=True)
        shutil.copy(record.image, image)
        shutil.copy(str(record.mask), mask)
        moved.append(replace(record, image=image, mask=mask))
    table = folder / "cases.csv"
    write_manifest(table, moved)
    before = sorted(folder.rglob("*"))
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link"):
        assert "masks/ is read" in refused("eval", "--model", shared()[2], "--data", table, "--out", out)
    (folder / "summary.json").touch()  # looks like an earlier result
    assert "masks/ is read" in refused("eval", "--model", shared()[2], "--data", table, "--out", folder)
    (folder / "summary.json").unlink()
    # Somebody else's masks, which are not read.
    other = tmp_path / "other"
    (other / "masks").mkdir(parents=True)
    assert "earlier evaluation" in refused("eval", "--model", shared()[2], "--data", manifest, "--out", other)
    linked = tmp_path / "linked"
    linked.mkdir()
    os.link(manifest, linked / "cases.csv")
    assert "must not replace what is read" in refused(
        "eval", "--model", shared()[2], "--data", manifest, "--out", linked
    )
    assert "must be a folder" in refused("eval", "--model", shared()[2], "--data", manifest, "--out", manifest)
    assert "at most 255 bytes" in refused("eval", "--model", shared()[2], "--data", manifest, "--out", "ü" * 128)
    assert sorted(folder.rglob("*")) == before


def test_an_earlier_result_is_replaced(dataset: tuple[Path, list[Record]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        result = invoke("eval", "--model", shared()[2], "--data", dataset[0], "--out", out)
        assert result.exit_code == 0, result.output
        (out / "masks" / "stale.png").touch()
    assert invoke("eval", "--model", shared()[2], "--data", dataset[0], "--out", out).exit_code == 0
    assert len(list((out / "masks").iterdir())) == 4


def test_cases_of_any_length_have_files() -> None:
    names = file_names(["ü" * 300, "ü" * 301, "a" * 300, "é", "e\u0301", "E\u0301"])
    assert all(len(f"{name}.png".encode()) <= 255 for name in names)
    assert len({name.casefold() for name in names}) == 6
