"""Evaluating slices of volumes: what is written, printed and reported beside the scores of the slices."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_segmenter import shared

from ntpseg.data import Record, SlicePlace
from ntpseg.evaluation import Evaluation, EvaluationOptions, evaluate, write_report
from ntpseg.evaluation.tables import metric_rows, modality_rows, summary_table, volume_label, volume_rows
from ntpseg.evaluation.volumes import volume_scores
from ntpseg.generation import Segmenter

STRUCTURES = ("left", "right", "nothing")


def placed() -> list[Record]:
    """The tiny data set as two volumes, of the images of each size; the second without a slice distance."""
    records = []
    for record in shared()[0]:
        number, sentence = map(int, record.case[1:].split("/"))
        odd = number % 2
        place = SlicePlace(
            f"v{odd}", "axial", number // 2, None if odd else 5.0, 0.5, 2.0, "lung", "MR" if odd else "CT",
            STRUCTURES[sentence],
        )  # fmt: skip
        records.append(replace(record, place=place, subject=f"patient-{odd}"))
    return records


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(Segmenter(shared()[1]), placed(), EvaluationOptions(text_check=0))


def test_volumes_are_scored_from_the_masks_of_their_slices(evaluation: Evaluation) -> None:
    found = {(score.volume, score.structure): score for score in evaluation.volumes}
    assert set(found) == {(v, s) for v in ("v0", "v1") for s in STRUCTURES[:2]} | {("v0", "nothing")}
    chosen = [i for i, r in enumerate(evaluation.records) if (r.place.volume, r.place.structure) == ("v0", "left")]
    from ntpseg.data import read_truth

    truth = np.stack([read_truth(evaluation.records[i]) for i in chosen])
    expected = volume_scores(np.stack([evaluation.masks[i] for i in chosen]), truth, (5.0, 0.5, 2.0))
    assert found["v0", "left"].scores == pytest.approx(expected)
    assert "hd95_mm" not in found["v1", "left"].scores and "dice" in found["v1", "left"].scores
    summary = evaluation.summary["volumes"]
    assert (summary["cases"], summary["volumes"], summary["subjects"]) == (5, 2, 2)
    assert summary["per_volume"]["dice"]["value"] == pytest.approx(np.mean([s.scores["dice"] for s in found.values()]))
    assert summary["per_volume"]["hd95_mm"]["cases"] == 3
    # "nothing" is in every second slice, and none of those between is missing.
    assert found["v0", "nothing"].step == 2 and summary["missing"] == 0


def test_sizes_are_checked_before_anything_is_decoded() -> None:
    records = [replace(r, place=SlicePlace("v", "axial", n)) for n, r in enumerate(shared()[0][:4])]
    stages: list[str] = []
    with pytest.raises(ValueError, match=r"slices of volume 'v' must have one size, got \[48, 48\] and \[40, 56\] in"):
        evaluate(Segmenter(shared()[1]), records, progress=lambda stage, done, total: stages.append(stage))
    assert "decoding" not in stages


def test_groups_are_structures_and_modalities(evaluation: Evaluation) -> None:
    assert evaluation.summary["grouped_by"] == "structure"
    assert set(evaluation.summary["groups"]) == set(STRUCTURES)
    modalities = evaluation.summary["modalities"]
    counts = {name: sum(r.place.modality == name for r in evaluation.records) for name in ("CT", "MR")}
    assert {name: group["cases"] for name, group in modalities.items()} == counts
    assert {row[0] for row in modality_rows(evaluation.summary)} == {f"{n} x {m}" for m, n in counts.items()}


def test_the_unit_is_millimetres_where_all_are_known(evaluation: Evaluation) -> None:
    headings = [row[0] for row in metric_rows(evaluation.summary)]
    assert headings == ["Dice", "IoU", "HD95 (mm)", "ASSD (mm)", "Area error (mm2)"]
    records = [*placed()[:4], *shared()[0][4:8]]
    mixed = evaluate(Segmenter(shared()[1]), records, EvaluationOptions(text_check=0))
    names = ["Dice", "IoU", "HD95 (px)", "ASSD (px)", "HD95 (mm), 4 images", "ASSD (mm), 4 images"]
    assert [row[0] for row in metric_rows(mixed.summary)] == [*names, "Area error (mm2), 4 images"]
    value = mixed.summary["millimetres"]["hd95_mm"]["value"]
    assert (
        value == pytest.approx(mixed.per_case["hd95_mm"][:4].mean()) and np.isnan(mixed.per_case["hd95_mm"][4:]).all()
    )
    assert mixed.summary["per_image"]["hd95"]["value"] == pytest.approx(mixed.per_case["hd95"].mean())


def test_files_table_and_report(evaluation: Evaluation, tmp_path: Path) -> None:
    from rich.console import Console

    run = tmp_path / "run"
    folder = run / "eval" / "test"
    evaluation.write(folder)
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == evaluation.summary
    with (folder / "volumes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["volume"], r["structure"]) for r in rows] == [(s.volume, s.structure) for s in evaluation.volumes]
    first = evaluation.volumes[0]
    assert float(rows[0]["true_ml"]) == pytest.approx(first.true * 0.005, rel=1e-5)
    assert float(rows[0]["hd95_mm"]) == pytest.approx(first.scores["hd95_mm"], rel=1e-5)
    assert all((r["hd95_mm"] == "") == (r["volume"] == "v1") for r in rows)
    with (folder / "cases.csv").open(newline="", encoding="utf-8") as file:
        cases = list(csv.DictReader(file))
    assert [(c["volume"], c["slice"], c["structure"]) for c in cases] == [
        (r.place.volume, str(r.place.index), r.place.structure) for r in evaluation.records
    ]
    assert float(cases[0]["hd95_mm"]) == pytest.approx(evaluation.per_case["hd95_mm"][0], rel=1e-5)

    console = Console(width=160, record=True, file=(tmp_path / "printed").open("w"))
    console.print(summary_table(evaluation.summary, "test"))
    printed = console.export_text()
    label = volume_label(evaluation.summary)
    assert label.startswith("5 structures of 2 volumes, ") and label in printed
    for heading, figure in volume_rows(evaluation.summary):
        assert f"{heading}, volume" in printed and figure in printed
    assert "HD95 (mm), 3 of 5, volume" in printed

    shutil.copy(shared()[2] / "trainer_log.jsonl", run)
    html = write_report(run).read_text(encoding="utf-8")
    assert label in html and "HD95 and ASSD in millimetres." in html and "Modalities" in html
    assert f"HD95 {evaluation.per_case['hd95_mm'].max():.2f} mm" in html

    plain = evaluate(Segmenter(shared()[1]), shared()[0][:3], EvaluationOptions(text_check=0))
    plain.write(folder)
    assert not (folder / "volumes.csv").exists() and "volumes" not in plain.summary
    assert "volume" not in (folder / "cases.csv").read_text(encoding="utf-8").splitlines()[0]
