"""Evaluating a small model: what is scored, what is written, what the command prints."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_segmenter import shared, write_manifest
from typer.testing import CliRunner

from ntpseg.data import Record, read_mask, resize_mask
from ntpseg.evaluation import EvaluationOptions, evaluate, segmentation_metrics
from ntpseg.evaluation.calibration import PixelCounts
from ntpseg.evaluation.groups import group_cases
from ntpseg.evaluation.report import write_report
from ntpseg.evaluation.result import file_names
from ntpseg.generation import DecodingOptions, Segmenter
from ntpseg.generation.calibration import calibrate


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


def test_calibration_is_of_the_models_own_probabilities(evaluation) -> None:
    records, bundle, _ = shared()
    segmenter, counts = Segmenter(bundle), PixelCounts()
    for record, prediction in zip(
        records, segmenter.segment_all([r.image for r in records], [r.text for r in records])
    ):
        counts.add(prediction.probability, resize_mask(read_mask(record.mask), *prediction.probability.shape))
    found = evaluation.summary["calibration"]
    assert found["uncalibrated"] == found["calibrated"] == counts.measures()
    assert counts.pixels == len(records) * bundle.vision.image_size**2
    assert evaluation.per_case["entropy"].shape == (len(records),) and "sample_dice" not in evaluation.per_case


def test_a_fitted_temperature_changes_probabilities_and_no_score(evaluation) -> None:
    records, bundle, _ = shared()
    fitted = evaluate(Segmenter(bundle), records, EvaluationOptions(text_check=0, calibrate=True))
    temperature = fitted.summary["decoding"]["calibration_temperature"]
    assert abs(temperature - 1) > 0.05 and fitted.summary["per_image"] == evaluation.summary["per_image"]
    before, after = (fitted.summary["calibration"][side] for side in ("uncalibrated", "calibrated"))
    assert before == evaluation.summary["calibration"]["uncalibrated"] and after["nll"] < before["nll"]
    expected = calibrate(
        next(iter(Segmenter(bundle).segment_all([records[0].image], [records[0].text]))).probability, temperature
    )
    np.testing.assert_allclose(fitted.probability[0] / 255, expected, atol=0.6 / 255)
    options = DecodingOptions(calibration_temperature=temperature)
    saved = evaluate(Segmenter(bundle, options), records, EvaluationOptions(text_check=0))
    assert saved.summary["calibration"] == fitted.summary["calibration"]


def test_samples_are_compared_with_each_other(tmp_path: Path) -> None:
    records, bundle, _ = shared()
    options = DecodingOptions(method="sample", samples=3, temperature=2.0)
    result = evaluate(Segmenter(bundle, options), records[:4], EvaluationOptions(text_check=0))
    for i, record in enumerate(records[:4]):
        one = Segmenter(bundle, options).segment(record.image, record.text)
        assert result.per_case["sample_dice"][i] == pytest.approx(one.sample_dice, abs=1e-6)
        assert result.per_case["entropy"][i] == pytest.approx(one.entropy.mean(), abs=1e-5)
    result.write(tmp_path / "eval" / "val")
    with (tmp_path / "eval" / "val" / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sample_dice"]) for row in rows] == pytest.approx(result.per_case["sample_dice"], rel=1e-5)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Dice between samples" in page and "<h2>Calibration</h2>" in page and "share of foreground" in page


def test_command_saves_the_temperature_of_the_validation_split(tmp_path: Path) -> None:
    from ntpseg.cli import app

    records, bundle, source = shared()
    run = tmp_path / "run"
    shutil.copytree(source, run)
    bundle.save_pretrained(run / "model")
    write_manifest(tmp_path / "data.csv", records)
    command = ["eval", "--model", str(run), "--data", str(tmp_path / "data.csv"), "--text-check", "0", "--calibrate"]
    for more, message in (
        ((), "--calibrate must be given with --split val, .* got None"),
        (("--split", "test"), "--calibrate must be given with --split val, .* got test"),
        (("--split", "val", "--method", "sample"), "--method must be left out with --calibrate, .* got sample"),
        (("--split", "val", "--top-p", "0.5"), "--top-p must be left out with --calibrate, .* got 0.5"),
    ):
        refused = CliRunner().invoke(app, [*command, *more])
        assert isinstance(refused.exception, ValueError) and re.search(message, str(refused.exception)), message
    before = Segmenter.from_pretrained(run)
    assert before.options.calibration_temperature == 1
    result = CliRunner().invoke(app, [*command, "--split", "val"], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    summary = json.loads((run / "eval" / "val" / "summary.json").read_text(encoding="utf-8"))
    temperature = summary["calibration"]["calibrated"]["temperature"]
    assert f"at temperature {temperature:g}" in result.output and "ECE, all pixels" in result.output
    # The manifest tells a folder whose files differ; this one is whole.
    after = Segmenter.from_pretrained(run)
    assert after.options == replace(before.options, calibration_temperature=temperature)
    choice = json.loads((run / "decoding_choice.json").read_text(encoding="utf-8"))
    assert choice["options"]["calibration_temperature"] == temperature
    assert choice["calibration"]["calibrated"] == summary["calibration"]["calibrated"]
    again = CliRunner().invoke(app, [*command[:-1], "--split", "val", "--out", str(tmp_path / "again")])
    assert again.exit_code == 0
    other = json.loads((tmp_path / "again" / "summary.json").read_text(encoding="utf-8"))
    assert other["calibration"] == summary["calibration"]


def test_a_split_that_is_not_there_is_told_with_those_that_are(tmp_path):
    from ntpseg.cli import app

    records, _, run = shared()
    write_manifest(tmp_path / "data.csv", [r for r in records if r.split == "train"])
    command = ["eval", "--model", str(run), "--data", str(tmp_path / "data.csv"), "--out", str(tmp_path / "out")]
    for more, message in (
        ((), "--split must be given for data without a test or val split, got none; .* has train"),
        (("--split", "val"), "split must have a case with a mask in .*, got 'val'; it has train"),
    ):
        error = CliRunner().invoke(app, [*command, *more]).exception
        assert isinstance(error, ValueError) and re.fullmatch(message, str(error)), error
