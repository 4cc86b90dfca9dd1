"""A model in one file: what is packed comes out again, and what does not belong there is refused."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_segmenter import shared
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.evaluation import EvaluationOptions, evaluate
from ntpseg.generation import Segmenter
from ntpseg.models.archive import pack_bundle, unpack_bundle
from ntpseg.models.bundle import Bundle

CARD = ["--license", "CC-BY-4.0", "--data", "Squares on noise, by the tests."]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records, bundle, source = shared()
    run = tmp_path_factory.mktemp("pack") / "run"
    shutil.copytree(source, run)
    result = evaluate(Segmenter(bundle), records[:4], EvaluationOptions(text_check=0))
    result.write(run / "eval" / "test")
    out = run.parent / "model.zip"
    done = CliRunner().invoke(app, ["pack", str(run), "--out", str(out), "--title", "Squares", *CARD])
    assert done.exit_code == 0, done.output
    return out


def test_the_file_predicts_what_the_run_does(packed: Path, tmp_path: Path) -> None:
    records, bundle, _ = shared()
    image, text = str(records[0].image), records[0].text
    expected = Segmenter(bundle).segment(image, text)
    np.testing.assert_array_equal(Segmenter.from_pretrained(packed).segment(image, text).mask, expected.mask)
    options = ["--image", image, "--text", text, "--out", str(tmp_path / "mask.png")]
    done = CliRunner().invoke(app, ["predict", "--model", str(packed), *options])
    assert done.exit_code == 0 and (tmp_path / "mask.png").is_file(), done.output


def test_the_card_names_licence_data_and_scores(packed: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        card = archive.read("README.md").decode()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    for words in ("# Squares", "Squares on noise, by the tests.", "The test split, 4 images", "| Dice |", "Limits"):
        assert words in card
    assert "| ECE, all pixels |" in card


def test_equal_content_gives_equal_bytes(packed: Path, tmp_path: Path) -> None:
    folder = unpack_bundle(packed)
    card = (folder / "README.md").read_text(encoding="utf-8")
    first, second = (pack_bundle(folder, tmp_path / f"{n}.zip", card).read_bytes() for n in "ab")
    assert first == second == packed.read_bytes()


def test_what_is_no_archive_of_a_model_is_refused(packed: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.zip"
    cut.write_bytes(packed.read_bytes()[:-200])
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a.txt", "no model")
    with pytest.raises(ValueError, match="must be an archive of `ntpseg pack`"):
        Bundle.from_pretrained(cut)
    with pytest.raises(ValueError, match="holds no trained model"):
        Bundle.from_pretrained(other)
    with pytest.raises(ValueError, match=r"must end in \.zip"):
        pack_bundle(tmp_path, tmp_path / "model.tar", "")


@pytest.mark.parametrize("name", ["../escaped", "/absolute", "a/../../b", "C:\\x", "..\\up"])
def test_no_entry_leaves_the_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), "x")
    with pytest.raises(ValueError, match="must hold relative paths"):
        unpack_bundle(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntpseg.models.archive.MAX_BYTES", 1000)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.safetensors", bytes(100_000))
    with pytest.raises(ValueError, match="must unpack to 1000 bytes at most, got 100000"):
        unpack_bundle(path)


def test_eval_of_a_file_needs_a_result_folder(packed: Path) -> None:
    done = CliRunner().invoke(app, ["eval", "--model", str(packed), "--data", "anywhere"])
    assert done.exit_code != 0 and "--out must name the result folder" in str(done.exception)


def test_the_card_and_the_file_say_which_slices_the_model_knows(tmp_path: Path) -> None:
    from ntpseg.evaluation.model_card import model_card
    from ntpseg.models.volume_input import VolumeInput

    run = tmp_path / "run"
    shutil.copytree(shared()[2], run)
    card = ("Squares", "CC-BY-4.0", "Squares on noise.")
    assert "slices of volumes" not in model_card(run, *card)
    known = VolumeInput("axial", "lung+soft-tissue+bone")
    bundle = Bundle.from_pretrained(run)
    bundle.volume = known
    bundle.save_pretrained(run / "model")
    assert "Training images: axial slices of volumes, window lung+soft-tissue+bone." in model_card(run, *card)
    out = pack_bundle(run / "model", tmp_path / "model.zip", model_card(run, *card))
    assert Bundle.from_pretrained(out).volume == known


@pytest.mark.parametrize("option", ["--data", "--license", "--title"])
def test_a_card_with_an_empty_text_is_refused(tmp_path: Path, option: str) -> None:
    out = tmp_path / "m.zip"
    done = CliRunner().invoke(app, ["pack", str(shared()[2]), "--out", str(out), *CARD, option, " "])
    assert str(done.exception) == f"{option} must be a text for the model card, got ' '" and not out.exists()
