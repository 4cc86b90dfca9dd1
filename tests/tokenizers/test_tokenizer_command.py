"""`ntpseg tokenizer train | encode | report` on a small data set on disk, and the figures in the report."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from ntpseg.commands.tokenizer import register
from ntpseg.data import Record, load_records
from ntpseg.tokenizers.auto import load_vision_tokenizer
from ntpseg.tokenizers.cache import TokenCache
from ntpseg.tokenizers.quality import measure, perplexity
from ntpseg.tokenizers.report import write_report


@pytest.fixture(scope="module")
def data(tmp_path_factory, ellipses):
    """LViT's layout: 12 training pairs, 3 validation pairs and 5 test pairs of 48 x 40 pixels."""
    root = tmp_path_factory.mktemp("data")
    for seed, (folder, name, count) in enumerate([("Train", "Train", 12), ("Val", "Val", 3), ("Test", "Test", 5)]):
        images, masks = ellipses(count, 48, seed=seed)
        base = root / f"{folder}_Folder"
        for part in ("img", "labelcol"):
            (base / part).mkdir(parents=True)
        for i in range(count):
            pixels = ((images[i, 0, :, :40] + 1) * 127.5).byte().numpy()
            Image.fromarray(pixels).save(base / "img" / f"{name}{i}.png")
            mask = masks[i, 0, :, :40].byte().numpy() * 255
            mask[0, 0] = 255  # an ellipse may lie outside the crop, and an empty mask counts as bad data
            Image.fromarray(mask).save(base / "labelcol" / f"{name}{i}.png")
        rows = [(f"{name}{i}.png", f"One area in the {'left' if i % 2 else 'right'} lung.") for i in range(count)]
        pd.DataFrame(rows, columns=["Image", "Description"]).to_excel(base / f"{name}_text.xlsx", index=False)
    return root


@pytest.fixture(scope="module")
def run():
    """Call the program; the exit code must be as expected."""
    app = typer.Typer()
    register(app)

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, ["tokenizer", *map(str, arguments)])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return call


@pytest.fixture(scope="module")
def trained(data, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizers")
    sizes = ("--size", 32, "--image-codes", 16, "--mask-codes", 12, "--steps", 5, "--device", "cpu")
    run("train", data, out, *sizes, "--variants", 1, "--flip", 0.5)
    return out


def test_train_writes_both_tokenizers(trained):
    vision = load_vision_tokenizer(trained / "vision")
    assert (vision.image_size, vision.channels, vision.image_codes, vision.mask_codes) == (32, 1, 16, 12)
    assert (trained / "text" / "tokenizer.json").is_file()


def test_encode_writes_a_cache_once(data, run, trained, tmp_path):
    arguments = ("encode", data, tmp_path, "--tokenizers", trained, "--split", "val", "--variants", 2)
    output = run(*arguments).output
    (folder,) = tmp_path.iterdir()
    assert folder.name in output.replace("\n", "")
    cache = TokenCache.open(tmp_path, folder.name)
    assert cache.mask_codes.shape == (3, 3, 4, 4)
    run(*arguments)
    assert list(tmp_path.iterdir()) == [folder]


def test_report_is_one_file_with_the_measured_figures(data, run, trained, tmp_path):
    out = tmp_path / "reports" / "tokenizer.html"
    output = run("report", data, "--tokenizers", trained, "--out", out, "--examples", 2).output
    html = out.read_text()
    records = [r for r in load_records(data) if r.split == "test"]
    summary = measure(load_vision_tokenizer(trained / "vision"), records, progress=False).summary()
    for figure in (f"{summary['dice_ceiling']:.4f}", f"{summary['image_psnr_db']:.2f} dB"):
        assert figure in html
        assert figure in output
    # Two examples drawn evenly and the three others, which are among the four worst; five tiles each.
    assert len(re.findall(r'<img src="data:image/png;base64,', html)) == 25
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert [p.name for p in out.parent.iterdir()] == ["tokenizer.html"]


def test_report_takes_a_sample_and_a_trained_model(data, run, trained, tmp_path):
    (tmp_path / "model").symlink_to(trained)
    out = tmp_path / "r.html"
    output = run("report", data, "--tokenizers", tmp_path, "--out", out, "--limit", 3, "--split", "train").output
    assert "3 pairs" in output


def test_mistakes_are_named(data, run, trained, tmp_path):
    result = run("report", data, "--tokenizers", tmp_path, code=1)
    assert "must hold a vision tokenizer" in str(result.exception)
    result = run("encode", data, tmp_path, "--tokenizers", trained, "--split", "dev", code=1)
    assert "split must be one of test, train, val, the splits of the data, got 'dev'" in str(result.exception)
    result = run("train", data, tmp_path, "--size", 30, code=1)
    assert "size must be a multiple of factor, 8, got 30" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


class Lossy:
    """A tokenizer whose decoder gives a fixed mask and an image that is off by 0.2 everywhere."""

    image_size, channels, factor = 8, 1, 4
    image_grid = mask_grid = (2, 2)
    image_codes = mask_codes = 4
    shared_codebook = False

    def __init__(self, mask):
        self.fixed = mask

    def encode_image(self, x):
        self.seen = x
        return torch.tensor([[0, 0], [1, 1]]).expand(len(x), 2, 2)

    def encode_mask(self, x):
        return torch.full((len(x), 2, 2), 3)

    def decode_image(self, codes):
        return self.seen + 0.2

    def decode_mask(self, codes):
        return self.fixed.expand(len(codes), 1, 8, 8)


def test_figures_are_those_of_a_case_worked_by_hand(tmp_path):
    records = []
    for i, rows in enumerate([8, 16]):
        truth = np.zeros((16, 16), np.uint8)
        truth[:rows] = 255
        Image.fromarray(truth).save(tmp_path / f"m{i}.png")
        Image.fromarray(np.full((16, 16), 100, np.uint8)).save(tmp_path / f"i{i}.png")
        records.append(Record(tmp_path / f"i{i}.png", tmp_path / f"m{i}.png", "x", "test", f"c{i}", f"s{i}"))
    fixed = torch.zeros(1, 1, 8, 8)
    fixed[..., :4, :] = 1
    quality = measure(Lossy(fixed), records, examples=1, worst=1, progress=False)
    # The decoded upper half against a true upper half, then against a mask that is foreground everywhere.
    assert quality.dice_resized == pytest.approx([1.0, 2 / 3])
    assert quality.dice == pytest.approx([1.0, 2 / 3], abs=0.03)
    assert quality.psnr == pytest.approx([20.0, 20.0], abs=1e-3)
    assert quality.image_usage.tolist() == [4, 4, 0, 0]
    assert quality.mask_usage.tolist() == [0, 0, 0, 8]
    assert quality.summary()["image_perplexity"] == pytest.approx(2.0)
    assert [example.case for example in quality.examples] == ["c0", "c1"]


def test_perplexity_of_even_use_is_the_number_of_codes():
    assert perplexity(np.array([5, 5, 5, 0])) == pytest.approx(3.0)


def test_a_perfect_round_trip_can_be_reported(tmp_path):
    blank = np.zeros((8, 8), np.uint8)
    for name in ("i", "m"):
        Image.fromarray(blank).save(tmp_path / f"{name}.png")
    record = Record(tmp_path / "i.png", tmp_path / "m.png", "<b>&", "test", "c", "s")

    class Perfect(Lossy):
        def decode_image(self, codes):
            return self.seen

    vision = Perfect(torch.zeros(1, 1, 8, 8))
    quality = measure(vision, [record], progress=False)
    assert quality.dice.tolist() == [1.0]
    assert np.isfinite(quality.psnr).all()
    write_report(Path(tmp_path / "r.html"), vision, quality, "A & B")
    html = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;&amp;" in html
    assert "A &amp; B" in html
