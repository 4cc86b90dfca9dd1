"""Evaluating a small model: what is scored, what is written, what the command prints."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_segmenter import shared
from typer.testing import CliRunner

from ntpseg.data import Record, read_mask
from ntpseg.evaluation import EvaluationOptions, evaluate, segmentation_metrics
from ntpseg.evaluation.groups import group_cases
from ntpseg.evaluation.result import file_names
from ntpseg.generation import Segmenter


@pytest.fixture(scope="module")
def evaluation():
    records, bundle, _ = shared()
    return evaluate(Segmenter(bundle), records, EvaluationOptions(text_check=8))


def test_scores_are_those_of_the_predicted_masks_at_the_images_own_size(evaluation) -> None:
    records, bundle, _ = shared()
    segmenter = Segmenter(bundle)
    for i in (0, 5, len(records) - 1):
        truth = read_mask(records[i].mask)
        prediction = segmenter.segment(records[i].image, records[i].text)
        assert prediction.mask.shape == truth.shape
        np.testing.assert_array_equal(prediction.mask, evaluation.masks[i])
        expected = segmentation_metrics(prediction.mask[None], truth[None])
        for name, values in expected.items():
            assert evaluation.per_case[name][i] == pytest.approx(values[0])
    assert evaluation.summary["per_image"]["dice"]["value"] == pytest.approx(evaluation.per_case["dice"].mean())


def test_the_model_of_these_tests_reads_its_sentence(evaluation) -> None:
    check = evaluation.summary["text_check"]
    assert check["cases"] == 8
    assert check["right"]["value"] > 0.5 > check["other"]["value"]
    assert check["right"]["value"] == pytest.approx(evaluation.per_case["dice"][evaluation.checked].mean())
    texts = [evaluation.records[i].text for i in evaluation.checked]
    assert all(a != b for a, b in zip(texts, evaluation.other_text, strict=True))


def test_the_ceiling_is_the_truth_through_the_tokenizer(evaluation) -> None:
    assert 0.8 < evaluation.summary["ceiling"] <= 1
    empty = [i for i, mask in enumerate(evaluation.records) if not read_mask(mask.mask).any()]
    assert (evaluation.per_case["ceiling"][empty] == 1).all()


def test_structures_are_the_groups_where_the_cases_name_them() -> None:
    def cases(*names: str) -> list[Record]:
        return [Record(Path("i"), None, f"text {i % 4}", "test", name, "s") for i, name in enumerate(names)]

    kind, groups = group_cases(cases(*(f"ct_z00{i}_{part}" for i in range(3) for part in ("left-lung", "aorta"))))
    assert kind == "structure" and groups == ["left-lung", "aorta"] * 3
    # Numbers, names that never repeat, one name for all and names without an ending say nothing.
    for names in (["covid_001", "covid_002"], ["a_x", "b_y", "c_z"], ["a_x", "b_x", "c_x"], ["a_x", "b", "c_x", "d_x"]):
        kind, groups = group_cases(cases(*names))
        assert kind == "sentence" and groups == [f"text {i % 4}" for i in range(len(names))]


def test_groups_are_the_sentences(evaluation) -> None:
    assert evaluation.summary["grouped_by"] == "sentence"
    groups = evaluation.summary["groups"]
    assert sum(g["cases"] for g in groups.values()) == len(evaluation.records)
    for text, group in groups.items():
        chosen = [r.text == text for r in evaluation.records]
        assert group["per_image"]["dice"]["value"] == pytest.approx(evaluation.per_case["dice"][chosen].mean())


def test_files_hold_every_case(evaluation, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "stale.png").touch()
    evaluation.write(tmp_path)
    with (tmp_path / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["case"] for r in rows] == [r.case for r in evaluation.records]
    assert [r["text"] for r in rows] == [r.text for r in evaluation.records]
    assert sorted(p.stem for p in (tmp_path / "masks").iterdir()) == sorted(r["file"] for r in rows)
    assert len(list((tmp_path / "masks_other").iterdir())) == 8
    for i, row in enumerate(rows):
        assert float(row["dice"]) == pytest.approx(evaluation.per_case["dice"][i], rel=1e-5)
        np.testing.assert_array_equal(read_mask(tmp_path / "masks" / f"{row['file']}.png"), evaluation.masks[i])
    assert sum(bool(r["other_text_dice"]) for r in rows) == 8
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == evaluation.summary
    assert np.load(tmp_path / "confidence.npy").shape == evaluation.confidence.shape


def test_one_sentence_for_all_leaves_out_the_other_text() -> None:
    records, bundle, _ = shared()
    left = [r for r in records if r.text == records[0].text]
    result = evaluate(Segmenter(bundle), left, EvaluationOptions(text_check=4))
    assert result.summary["text_check"]["other"] is None
    assert result.other_masks == []


def test_a_case_without_a_mask_is_named() -> None:
    records, bundle, _ = shared()
    with pytest.raises(ValueError, match="must all have a mask, got 1 without one: 'p0/0'"):
        evaluate(Segmenter(bundle), [replace(records[0], mask=None)])
    with pytest.raises(ValueError, match="records must hold at least one"):
        evaluate(Segmenter(bundle), [])
    with pytest.raises(ValueError, match="text_check must be an integer >= 0, got -1"):
        EvaluationOptions(text_check=-1)


def test_file_names_are_distinct_and_safe() -> None:
    names = file_names(["a/b", "a b", "A_b", "ü.1", "", "../x"])
    assert len({n.lower() for n in names}) == 6
    assert all("/" not in n and " " not in n for n in names)


def test_command_writes_and_prints_both_dices(tmp_path: Path) -> None:
    from ntpseg.cli import app

    _, _, run = shared()
    out = tmp_path / "out"
    arguments = ["eval", "--model", str(run / "model"), "--split", "test", "--text-check", "2", "--out", str(out)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["cases"] == sum(r.split == "test" for r in shared()[0])
    assert "per-image mean" in result.output and "pooled over pixels" in result.output
    assert f"{summary['per_image']['dice']['value']:.3f}" in result.output
    assert f"{summary['pooled']['dice']['value']:.3f}" in result.output
    missing = CliRunner().invoke(app, [*arguments, "--split", "dev"])
    assert isinstance(missing.exception, ValueError) and "got 'dev'" in str(missing.exception)


def test_split_where_none_is_named() -> None:
    from ntpseg.commands.evaluate import default_split

    records = shared()[0]
    assert default_split(records) == "test"
    assert default_split([r for r in records if r.split != "test"]) == "val"
