"""report, pack, tokenizer and train write over nothing that they read or that is not theirs."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_segmenter import shared
from typer.testing import CliRunner

from ntpseg.cli import app, main
from ntpseg.evaluation import EvaluationOptions, evaluate
from ntpseg.evaluation.report import write_report
from ntpseg.generation import Segmenter
from ntpseg.training.config import dump_config, load_config


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(result.exception, ValueError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records, bundle, source = shared()
    run = tmp_path_factory.mktemp("outputs") / "run"
    shutil.copytree(source, run)
    evaluate(Segmenter(bundle), records[:3], EvaluationOptions(text_check=0)).write(run / "eval" / "test")
    return run


def test_a_report_is_html_and_replaces_nothing_that_it_reads(evaluated: Path, tmp_path: Path) -> None:
    for name in ("report.png", "report", "r.zip"):
        assert "--out must end in .html or .htm" in refused("report", evaluated, "--out", tmp_path / name)
    for read in (evaluated / "config.yaml", evaluated / "eval" / "test" / "cases.csv", shared()[0][0].image):
        link = tmp_path / f"{read.name}.html"
        os.link(read, link)
        assert "must not replace what is read" in refused("report", evaluated, "--out", link)
    (tmp_path / "d.html").mkdir()
    assert write_report(evaluated, tmp_path) == tmp_path / "report.html"
    assert write_report(evaluated, tmp_path / "d.html") == tmp_path / "d.html" / "report.html"
    with pytest.raises(ValueError, match=r"--out must be a folder, got .*cases\.csv is a file"):
        write_report(evaluated, evaluated / "eval" / "test" / "cases.csv" / "r.html")


def test_a_package_stays_outside_of_what_is_packed(evaluated: Path, tmp_path: Path) -> None:
    card = ("--license", "MIT", "--data", "x")
    out = tmp_path / "m.zip"
    assert "outside of the folder" in refused("pack", evaluated, "--out", evaluated / "model" / "m.zip", *card)
    assert "must end in .zip" in refused("pack", evaluated, "--out", tmp_path / "m.tar", *card)
    assert CliRunner().invoke(app, ["pack", str(evaluated), "--out", str(out), *card]).exit_code == 0
    assert "must not replace what is read" in refused("pack", out, "--out", out, *card)
    os.link(evaluated / "model" / "config.json", tmp_path / "c.zip")
    assert "must not replace what is read" in refused("pack", evaluated, "--out", tmp_path / "c.zip", *card)


def test_tokenizers_stay_out_of_what_is_read(evaluated: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    model = evaluated / "model"
    for arguments in (
        ("train", data, data),
        ("encode", data, data, "--tokenizers", model),
        ("encode", data, tmp_path / "data" / ".." / "data", "--tokenizers", model),
        ("encode", data, model, "--tokenizers", model),
    ):
        assert "OUT must not be what is read" in refused("tokenizer", *arguments)
    (tmp_path / "file").touch()
    assert "OUT must be a folder" in refused("tokenizer", "train", data, tmp_path / "file")
    report = ("tokenizer", "report", data, "--tokenizers", model, "--out")
    assert "must end in .html" in refused(*report, tmp_path / "r.csv")
    os.link(model / "config.json", tmp_path / "r.html")
    assert "must not replace what is read" in refused(*report, tmp_path / "r.html")
    device = refused(
        "tokenizer", "report", data, "--tokenizers", model, "--out", tmp_path / "n.html", "--device", "tpu"
    )
    assert "got 'tpu'" in device


@pytest.mark.parametrize("key", ["data.path", "model.weights", "text.path", "vision.path"])
def test_training_anew_removes_nothing_that_it_reads(tmp_path: Path, key: str) -> None:
    run = tmp_path / "run"
    (run / "inside").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config("tiny")))
    (run / "prepared.json").touch()
    message = refused("train", "tiny", f"{key}={run / 'inside'}", f"output={run}", "--overwrite")
    assert "would remove" in message and key in message and (run / "inside").is_dir()


def test_a_configuration_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "config.yaml"
    mine.write_text("# my notes\nseed: 3\n")
    for source in (mine, "tiny"):
        assert "config.yaml that is no run's" in refused("train", source, f"output={tmp_path}", "data.path=nowhere")
    assert mine.read_text().startswith("# my notes")
    mine.write_text(dump_config(load_config("tiny", ["data.path=nowhere"])))
    result: Any = CliRunner().invoke(app, ["train", "tiny", f"output={tmp_path}", "data.path=nowhere"])
    assert isinstance(result.exception, FileNotFoundError), "what an earlier attempt left can be tried again"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/model"),
            "runs/a/model: No space left on device; free",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: Permission denied; choose another folder"),
        (FileNotFoundError("path must be an existing data set, got x"), "path must be an existing data set, got x"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device; free space"),
        (ModuleNotFoundError("No module named 'galore_torch'"), "No module named 'galore_torch'); install it"),
        (MemoryError(), "memory ran out; make the batch"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8\nstack"),
            "can't allocate memory: 8;",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"), "No space left on device"),
    ],
)
def test_failing_files_end_in_one_line_with_the_cure(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("ntpseg.cli.app", fail)
    with pytest.raises(SystemExit) as stopped:
        main()
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in message and "\n" not in message


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("ntpseg.cli.app", fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        main()
