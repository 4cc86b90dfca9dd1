"""A saved model is read whole or refused in one line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_segmenter import TEXTS, shared
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.models import Bundle

FILES = ("config.json", "model.safetensors", "sequence.json", "manifest.json")
FILES += ("text/tokenizer.json", "text/tokenizer_config.json", "vision/config.json", "vision/model.safetensors")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared()[2], tmp_path / "run"))


def refused(run: Path) -> str:
    """The one line with which ``ntpseg predict`` refuses a model; nothing is written."""
    image, out = shared()[0][0].image, run.parent / "out.png"
    arguments = ["predict", "--model", run, "--image", image, "--text", TEXTS[0], "--out", out]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(result.exception, ValueError), repr(result.exception)
    assert "\n" not in str(result.exception) and not out.exists()
    return str(result.exception)


def test_every_file_is_in_the_manifest(run) -> None:
    folder = run / "model"
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {*json.loads((folder / "manifest.json").read_text())["sha256"], "manifest.json"} == written >= set(FILES)


@pytest.mark.parametrize("how", ["missing", "empty", "cut to half", "64 bytes flipped", "last bit flipped"])
@pytest.mark.parametrize("name", FILES)
def test_damage_of_any_file_is_refused(run, name, how) -> None:
    path = run / "model" / name
    data = path.read_bytes()
    middle = len(data) // 2
    damaged = {
        "missing": None,
        "empty": b"",
        "cut to half": data[:middle],
        "64 bytes flipped": data[:middle] + bytes(b ^ 255 for b in data[middle : middle + 64]) + data[middle + 64 :],
        "last bit flipped": data[:-1] + bytes([data[-1] ^ 1]),
    }[how]
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    if (name, how) == ("manifest.json", "missing"):
        assert Bundle.from_pretrained(run), "a model of a release before 0.2 has none"
        return
    assert name in refused(run)


@pytest.mark.parametrize("part", ["model", "vision"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_are_not_the_configuration_s_are_refused(run, part, change) -> None:
    """Where no manifest tells: transformers fills what is missing at random, and a mask was written."""
    folder = run / "model" if part == "model" else run / "model" / "vision"
    (run / "model" / "manifest.json").unlink()
    weights = load_file(folder / "model.safetensors")
    name = sorted(name for name in weights if weights[name].dim() == 2)[0]
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights[name := "stray.weight"] = weights[sorted(weights)[0]].clone()
    else:
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(run)
    assert name in message and str(folder) in message


# Without its configuration the text tokenizer is read all the same, from tokenizer.json.
CUT = [(name, how) for name in FILES if name != "manifest.json" for how in ("missing", "empty", "cut to half")]
CUT.remove(("text/tokenizer_config.json", "missing"))


@pytest.mark.parametrize(("name", "how"), CUT)
def test_a_model_of_an_earlier_release_that_is_cut_off_is_refused(run, name, how) -> None:
    (run / "model" / "manifest.json").unlink()
    path = run / "model" / name
    data = path.read_bytes()
    path.unlink() if how == "missing" else path.write_bytes(b"" if how == "empty" else data[: len(data) // 2])
    refused(run)


def pack(run: Path, archive: Path):
    return CliRunner().invoke(app, ["pack", str(run), "--out", str(archive), "--license", "MIT", "--data", "squares"])


def test_packing_a_damaged_model_is_refused(run, tmp_path) -> None:
    path = run / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    result = pack(run, tmp_path / "m.zip")
    assert isinstance(result.exception, ValueError) and "model.safetensors is cut off" in str(result.exception)
    assert not (tmp_path / "m.zip").exists()


@pytest.mark.parametrize("place", range(5, 100, 10))
def test_a_damaged_archive_is_refused(run, tmp_path, place) -> None:
    archive = tmp_path / "m.zip"
    assert pack(run, archive).exit_code == 0
    assert Bundle.from_pretrained(archive)
    data = bytearray(archive.read_bytes())
    start = len(data) * place // 100
    data[start : start + 64] = bytes(b ^ 255 for b in data[start : start + 64])
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(data)
    assert str(damaged) in refused(damaged)
