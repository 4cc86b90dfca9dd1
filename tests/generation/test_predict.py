"""`Segmenter` and ``ntpseg predict``: single images, folders, tables of sentences."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_segmenter import TEXTS, shared
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.generation import DecodingOptions, Segmenter
from ntpseg.generation.folder import folder_jobs
from ntpseg.generation.overlay import PREDICTION, draw, outline


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_the_saved_model_predicts_what_the_trained_one_does() -> None:
    records, bundle, run = shared()
    trained, saved = Segmenter(bundle), Segmenter.from_pretrained(run)
    images, texts = [r.image for r in records], [r.text for r in records]
    for a, b in zip(trained.segment_all(images, texts), saved.segment_all(images, texts), strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_array_equal(a.confidence, b.confidence)


def test_a_caller_keeps_its_gradients_between_predictions() -> None:
    records, bundle, _ = shared()
    segmenter = Segmenter(bundle)
    for _ in segmenter.segment_all([r.image for r in records[:2]], [r.text for r in records[:2]]):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_an_array_and_its_file_give_the_same_and_colour_is_accepted() -> None:
    records, bundle, _ = shared()
    segmenter = Segmenter(bundle, DecodingOptions(dtype="float32"))
    pixels = np.asarray(Image.open(records[0].image))
    from_file, from_array = segmenter.segment(records[0].image, TEXTS[0]), segmenter.segment(pixels, TEXTS[0])
    np.testing.assert_array_equal(from_file.mask, from_array.mask)
    coloured = segmenter.segment(np.repeat(pixels[..., None], 3, 2), TEXTS[0])
    np.testing.assert_array_equal(coloured.mask, from_file.mask)
    assert from_file.confidence.shape == bundle.sequence.mask_grid
    assert ((from_file.confidence > 0) & (from_file.confidence <= 1)).all()


def test_different_sentences_give_different_masks() -> None:
    records, bundle, _ = shared()
    left, right = Segmenter(bundle).segment_all([records[0].image] * 2, TEXTS[:2])
    assert (left.mask & right.mask).sum() < 0.1 * min(left.mask.sum(), right.mask.sum())


def test_command_writes_mask_and_overlay_at_the_images_own_size(tmp_path: Path) -> None:
    records, bundle, run = shared()
    out, overlay = tmp_path / "deep" / "mask.png", tmp_path / "overlay.png"
    result = invoke(
        *("--model", run, "--image", records[3].image, "--text", TEXTS[1]), "--out", out, "--overlay", overlay
    )
    assert result.exit_code == 0, result.output
    mask = np.asarray(Image.open(out))
    assert mask.shape == (40, 56) and set(np.unique(mask)) <= {0, 255}
    np.testing.assert_array_equal(mask > 0, Segmenter(bundle).segment(records[3].image, TEXTS[1]).mask)
    assert np.asarray(Image.open(overlay)).shape == (40, 56, 3)


def test_command_takes_a_folder_with_one_sentence_for_all(tmp_path: Path) -> None:
    records, _, run = shared()
    folder = records[0].image.parent
    result = invoke("--model", run, "--image", folder, "--text", TEXTS[0], "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {p.name for p in folder.iterdir()}
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records) and {r["text"] for r in rows} == {TEXTS[0]}


def test_command_takes_a_table_of_sentences(tmp_path: Path) -> None:
    records, bundle, run = shared()
    image = records[0].image
    table = tmp_path / "texts.csv"
    table.write_text(f"Image,Text\n{image.name},{TEXTS[0]}\n{image.stem},{TEXTS[1]}\n", encoding="utf-8-sig")
    result = invoke(
        *("--model", run, "--image", image.parent, "--texts", table, "--out", tmp_path / "out"),
        *("--overlay", tmp_path / "drawn"),
    )
    assert result.exit_code == 0, result.output
    segmenter = Segmenter(bundle)
    for name, text in ((image.stem, TEXTS[0]), (f"{image.stem}_2", TEXTS[1])):
        mask = np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) > 0
        np.testing.assert_array_equal(mask, segmenter.segment(image, text).mask)
        assert (tmp_path / "drawn" / f"{name}.png").is_file()


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    records, _, run = shared()
    folder, image = records[0].image.parent, records[0].image
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("image,text\nnowhere,x\n", encoding="utf-8")
    (tmp_path / "u.csv").write_text("image,caption\n", encoding="utf-8")
    common = ("--model", run, "--out", tmp_path / "o")
    for arguments, message in (
        (("--image", image), "text must be the sentence"),
        (("--image", tmp_path / "no.png", "--text", "x"), "does not exist"),
        (("--image", folder), "exactly one of text and texts"),
        (("--image", tmp_path / "empty", "--text", "x"), "a folder without images"),
        (("--image", folder, "--texts", tmp_path / "t.csv"), "'nowhere', which is not in"),
        (("--image", folder, "--texts", tmp_path / "u.csv"), "no column 'text'"),
    ):
        result = invoke(*common, *arguments)
        assert isinstance(result.exception, ValueError) and message in str(result.exception), message


def test_results_of_one_stem_do_not_overwrite_each_other(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    jobs = folder_jobs(tmp_path, "x", None)
    assert sorted(job.name for job in jobs) == ["a", "a_2", "b"]


def test_overlay_leaves_the_outside_alone() -> None:
    image = np.full((20, 20), 100, np.uint8)
    mask = np.zeros((20, 20), bool)
    mask[5:12, 6:14] = True
    drawn = draw(image, mask)
    assert (drawn[~mask] == 100).all()
    assert (drawn[outline(mask)] == PREDICTION).all()
    assert outline(mask).sum() == 2 * 7 + 2 * 8 - 4
    with pytest.raises(ValueError, match=r"mask must have the image's size .* got \[20, 20\]"):
        draw(image[:10], mask)
