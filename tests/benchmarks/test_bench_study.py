"""The accuracy study: its cells can be run, finished ones are skipped, tables and subsets are right."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_segmenter import shared

from benchmarks.accuracy import reproduce
from benchmarks.accuracy.cells import GROUPS, Cell, qata_cells
from benchmarks.accuracy.study_tables import write_result, write_tables
from ntpseg.data import load_records
from ntpseg.training.config import load_config

ALL = qata_cells([5.0, 20.0, 60.0], 2)


def estimates(dice: float, pooled: float = 0.9) -> dict[str, Any]:
    def estimate(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01}

    return {
        "per_image": {"dice": estimate(dice), "iou": estimate(dice / 2)},
        "pooled": {"dice": estimate(pooled), "iou": estimate(pooled / 2)},
    }


def test_cells_have_names_of_their_own_and_lie_in_order() -> None:
    names = [cell.name for cell in ALL]
    assert len(set(names)) == len(names) and all(c.isalnum() or c in "-_." for name in names for c in name)
    assert {cell.group for cell in ALL} == set(GROUPS)
    assert {cell.group for cell in ALL if cell.final} == {"main"}
    main = [cell for cell in ALL if cell.group == "main" and cell.model != "text-prior"]
    assert [cell.seed for cell in main] == sorted(cell.seed for cell in main), "seed by seed"


def test_settings_of_every_cell_are_ones_of_the_recipe() -> None:
    for settings in {json.dumps(cell.settings) for cell in ALL if cell.model == "ntpseg"}:
        load_config("qata", [f"{key}={value}" for key, value in json.loads(settings).items()])


@pytest.mark.parametrize("minutes", [9.0, 28.0])
def test_the_result_file_is_of_what_the_command_trains(minutes) -> None:
    """The largest of the main table goes without caption conditioning, the recipe of its ablation does not."""
    path = Path(reproduce.__file__).parents[1] / "results" / "qata_large.json"
    cells = {(cell.group, cell.label, cell.seed): cell for cell in qata_cells([minutes], 3, ["main", "ablation"])}
    found = [cell for cell in json.loads(path.read_text())["cells"] if cell["minutes"] == minutes]
    assert found
    for cell in found:
        made = cells[cell["group"], cell["label"], cell["seed"]]
        assert (made.model, made.settings, made.final) == (cell["model"], cell["settings"], cell["final"])


def test_list_runs_nothing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(reproduce, "run_cell", lambda *arguments: pytest.fail("a cell was run"))
    arguments = ["qata", "nowhere", "--out", str(tmp_path / "study"), "--minutes", "5", "--seeds", "1", "--list"]
    assert reproduce.main([*arguments, "--groups", "main"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = qata_cells([5.0], 1, ["main"])
    assert lines[:-1] == [f"to do  {cell.name}" for cell in cells]
    assert lines[-1] == "40 core-minutes of training to do"
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "data must be a folder, got 'nowhere'"),
        ([".", "--jobs", "0"], "--jobs must be >= 1, got 0"),
        ([".", "--seeds", "0"], "--seeds must be >= 1, got 0"),
        ([".", "--only", "nomatch"], "--only must match the name of a cell, got 'nomatch'; --list shows them"),
    ],
)
def test_a_study_of_nothing_is_no_success(arguments, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["qata", *arguments, "--out", str(tmp_path / "study")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs a study whose cells are only written; those in `broken` fail."""
    calls: list[str] = []
    broken: set[str] = set()

    def run_cell(cell: Cell, data: Path, out: Path, threads: int, clock: str) -> dict[str, Any]:
        calls.append(cell.name)
        if cell.name in broken:
            raise subprocess.CalledProcessError(3, "train")
        result = {"group": cell.group, "label": cell.label, "minutes": cell.minutes, "seconds": 1.0}
        result |= {"val": {**estimates(0.7), "cases": 9}, **({"test": estimates(0.8)} if cell.final else {})}
        result |= {"seed": cell.seed, "decoding": {"seconds": 2.0, "tokens_per_second": 5.0}}
        (out / "cells").mkdir(parents=True, exist_ok=True)
        (out / "cells" / f"{cell.name}.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(reproduce, "run_cell", run_cell)

    def run(*more: str) -> int:
        calls.clear()
        return reproduce.main(["qata", str(tmp_path), "--out", str(tmp_path), "--minutes", "5", "--seeds", "2", *more])

    return SimpleNamespace(run=run, calls=calls, broken=broken, path=tmp_path)


def test_a_study_goes_on_where_it_stopped(study, capsys) -> None:
    expected = [cell.name for cell in qata_cells([5.0], 2, ["main"])]
    study.broken.add(expected[4])
    assert study.run("--groups", "main", "--only", "main_ntpseg_*") == 0
    assert study.calls == ["main_ntpseg_5min_seed0", "main_ntpseg_5min_seed1"]
    assert study.run("--groups", "main") == 1
    assert study.calls == [
        name for name in expected if name not in ("main_ntpseg_5min_seed0", "main_ntpseg_5min_seed1")
    ]
    assert f"{expected[4]}: failed (3)" in capsys.readouterr().out
    study.broken.clear()
    assert study.run("--groups", "main") == 0
    assert study.calls == [expected[4]]
    study.run("--groups", "main", "--list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 core-minutes of training to do" and sum(line.startswith("done ") for line in lines) == 17
    assert "17 models; the test split was scored 17 times" in (study.path / "tables.md").read_text()


def test_the_same_training_run_is_not_paid_for_twice(tmp_path, monkeypatch) -> None:
    """A row of another table takes the model of the main table, but never its test scores."""
    monkeypatch.setattr(reproduce, "_ntpseg", lambda *arguments: pytest.fail("trained again"))
    cells = {cell.name: cell for cell in qata_cells([5.0], 1)}
    main = cells["main_ntpseg_5min_seed0"]
    (tmp_path / "cells").mkdir()
    measured = {"val": estimates(0.7), "test": estimates(0.8), "steps": 9}
    (tmp_path / "cells" / f"{main.name}.json").write_text(json.dumps({**reproduce.asdict(main), **measured}))
    rows = ["ablation_the-recipe", "sweep_k-1", "sweep_m-0", "sweep_n-0", "low-data_ntpseg-100-of-the-training-pairs"]
    for row in rows:
        result = reproduce.run_cell(cells[f"{row}_5min_seed0"], tmp_path, tmp_path, 1, "cpu")
        saved = json.loads((tmp_path / "cells" / f"{row}_5min_seed0.json").read_text())
        assert result == saved and saved["val"] == measured["val"] and "test" not in saved
        assert saved["same_as"] == main.name and saved["group"] == row.split("_")[0]
    assert "1 models; the test split was scored 1 times" in write_tables(tmp_path).read_text()
    for other in ("ablation_nktp_5min_seed0", "low-data_ntpseg-25-of-the-training-pairs_5min_seed0"):
        assert reproduce.trained_before(cells[other], tmp_path) is None
    assert reproduce.trained_before(main, tmp_path) is None, "a final model is trained and scored itself"


def test_cells_that_need_another_come_after_it(study) -> None:
    """With several jobs a free one must not decode a model, or train it again, while it is being trained."""
    assert study.run("--groups", "main", "decoding", "ablation", "sweep", "--jobs", "3", "--seeds", "1") == 0
    place = {name: index for index, name in enumerate(study.calls)}
    assert sorted(study.calls) == sorted(
        c.name for c in qata_cells([5.0], 1, ["main", "decoding", "ablation", "sweep"])
    )
    waiting = [name for name in place if name.startswith("decoding_") or name == "ablation_the-recipe_5min_seed0"]
    waiting += [f"sweep_{row}_5min_seed0" for row in ("k-1", "k-2", "m-0", "m-5", "n-0", "n-16")]
    assert min(place[name] for name in waiting) > max(place[name] for name in place if name not in waiting)


def test_decodings_are_compared_at_one_threshold() -> None:
    assert {cell.settings["threshold"] for cell in ALL if cell.group == "decoding"} == {"0.5"}


def test_tables(tmp_path) -> None:
    """Median and range over seeds, the median seed's interval, and validation figures where test was not scored."""
    (tmp_path / "cells").mkdir()
    for seed, dice in enumerate((0.80, 0.86, 0.83)):
        cell = {"group": "main", "label": "ours", "minutes": 20.0, "steps": 100 + seed, "parameters": 2_500_000}
        cell |= {"val": estimates(dice + 0.05), "test": estimates(dice, 0.9)}
        (tmp_path / "cells" / f"a{seed}.json").write_text(json.dumps(cell))
    cell = {"group": "ablation", "label": "without", "minutes": 5.0, "final": False, "val": estimates(0.7)}
    (tmp_path / "cells" / "b.json").write_text(json.dumps(cell))
    path = write_tables(tmp_path)
    assert "4 models; the test split was scored 3 times" in path.read_text()
    rows = {
        line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]]
        for line in path.read_text().splitlines()
        if line.startswith("|")
    }
    assert rows["ours"] == [
        "20",
        "3",
        "101",
        "2.50M",
        "0.8800 (0.8500 to 0.9100)",
        "0.8300 (0.8000 to 0.8600) [0.820, 0.840]",
        "0.9000 (0.9000 to 0.9000) [0.890, 0.910]",
        "0.4150 (0.4000 to 0.4300)",
        "0.4500 (0.4500 to 0.4500)",
    ]
    assert rows["without"] == [
        "5",
        "1",
        "0",
        "",
        "0.7000",
        "0.7000 [0.690, 0.710]",
        "0.9000 [0.890, 0.910]",
        "0.3500",
        "0.4500",
    ]
    text = path.read_text()
    assert "4 models; the test split was scored 3 times" in text
    assert text.index("## Main") < text.index("## Ablation") < text.index("## Published")


def test_the_result_holds_every_cell_and_its_machine(tmp_path) -> None:
    """One file for a commit; rows of machines whose minutes differ are told apart."""
    (tmp_path / "cells").mkdir()
    fast, slow = {"device": "fast", "threads": 1}, {"device": "slow", "threads": 1}
    for name, machine in (("a", fast), ("b", fast), ("c", None), ("d", slow)):
        cell = {"group": "ablation", "label": name, "minutes": 5.0, "val": {**estimates(0.123456), "cases": 7, "x": 1}}
        cell |= {} if machine is None else {"machine": machine}
        cell |= {"choice": {"options": {"passes": 0}, "cases": 9, "tried": [1, 2]}} if name == "a" else {}
        (tmp_path / "cells" / f"{name}.json").write_text(json.dumps(cell))
    path = write_result(tmp_path, "ntpseg reproduce qata DATA")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["command"] == "ntpseg reproduce qata DATA" and found["machines"] == [fast, None, slow]
    assert [(cell["label"], cell["machine"]) for cell in found["cells"]] == [("a", 0), ("b", 0), ("c", 1), ("d", 2)]
    first = found["cells"][0]
    assert first["val"]["per_image"]["dice"] == {"value": 0.1235, "low": 0.1135, "high": 0.1335}
    assert set(first["val"]) == {"cases", "per_image", "pooled"} and set(first["choice"]) == {"options", "cases"}
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2 + len(found["cells"])
    assert "Trained on different machines" in write_tables(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "cells" / "d.json").unlink()
    assert "Trained on different machines" not in write_tables(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(("fraction", "share"), [(0.25, 0.25), (0.01, 0.0)])
def test_subset(tmp_path, fraction: float, share: float) -> None:
    _, _, run = shared()
    data = run.parent / "data.csv"
    whole = load_records(data)
    cell = Cell("low-data", "x", "ntpseg", 5.0, fraction=fraction)
    some = load_records(reproduce.subset(data, tmp_path, cell))
    for split in ("val", "test"):
        expected = [(r.image.resolve(), r.mask.resolve(), r.text, r.subject) for r in whole if r.split == split]
        assert [(r.image, r.mask, r.text, r.subject) for r in some if r.split == split] == expected
    training = [r for r in whole if r.split == "train"]
    kept = [r for r in some if r.split == "train"]
    assert len(kept) == max(1, round(share * len(training)))
    assert {(r.image, r.text) for r in kept} <= {(r.image.resolve(), r.text) for r in training}
    if len(kept) > 2:
        places = [next(i for i, r in enumerate(training) if r.image.resolve() == k.image) for k in kept]
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert max(gaps) - min(gaps) <= 1, "spread evenly"
    assert reproduce.subset(data, tmp_path, Cell("main", "x", "ntpseg", 5.0)) == data


@pytest.mark.parametrize("model", ["ntpseg", "text-unet", "text-prior"])
def test_a_cells_commands(tmp_path, monkeypatch, model) -> None:
    """What would be run is understood by what would run it, and its result is read."""
    from safetensors.torch import save_file

    commands = []

    def run(command: list[str], **options: Any) -> None:
        assert options["check"] and command[:2] == [sys.executable, "-m"]
        commands.append(command[2:])
        module, *arguments = command[2:]
        if module == "ntpseg.cli" and arguments[0] == "train":
            assert arguments[-1] == "--overwrite"
            config = load_config(arguments[1], arguments[2:-1])
            assert (config.seed, config.max_minutes, config.clock) == (3, 5.0, "cpu")
            folder = Path(str(config.output))
            (folder / "model").mkdir(parents=True)
            (folder / "trainer_log.jsonl").write_text('{"step": 1}\n{"step": 42}\n')
            save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, folder / "model" / "model.safetensors")
        elif module == "ntpseg.cli":
            folder = (
                Path(arguments[arguments.index("--model") + 1]) / "eval" / arguments[arguments.index("--split") + 1]
            )
            folder.mkdir(parents=True)
            summary = {**estimates(0.8), "cases": 7, "ceiling": 0.99, "decoding": {"method": "refine"}}
            (folder / "summary.json").write_text(json.dumps(summary))
        else:
            out = Path(arguments[arguments.index("--out") + 1])
            if module.endswith("baseline"):
                pytest.importorskip("monai")
                from benchmarks.accuracy import baseline

                monkeypatch.setattr(sys, "argv", ["baseline", *arguments])
                assert baseline.arguments().ema == 0
            out.write_text(json.dumps({"val": estimates(0.6), "test": estimates(0.8), "steps": 42, "options": {}}))

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    settings = {"ntpseg": {"model.k": "2"}, "text-unet": {"ema": "0"}}.get(model, {})
    cell = Cell("main", "x", model, 5.0, 3, settings, final=True)
    result = reproduce.run_cell(cell, tmp_path / "data", tmp_path, 1, "cpu")
    assert result["test"]["per_image"]["dice"]["value"] == 0.8 and result["steps"] == 42
    assert json.loads((tmp_path / "cells" / f"{cell.name}.json").read_text()) == result
    assert result["machine"]["threads"] == 1 and result["machine"]["torch"] == torch.__version__
    assert len((tmp_path / "logs" / f"{cell.name}.txt").read_text().splitlines()) == len(commands)
    if model == "ntpseg":
        assert result["parameters"] == 17 and [c[1] for c in commands] == ["train", "eval", "eval"]
