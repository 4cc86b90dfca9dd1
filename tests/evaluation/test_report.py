"""The report: one file, everything in it, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_segmenter import shared

from ntpseg.evaluation import EvaluationOptions, evaluate
from ntpseg.evaluation.pictures import LEVELS, TOKEN_FRAMES, greyscale, probability_contours, token_frames
from ntpseg.evaluation.report import write_report
from ntpseg.generation import Segmenter
from ntpseg.utils.files import read_csv

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records, bundle, source = shared()
    folder = tmp_path_factory.mktemp("report") / "run"
    folder.mkdir()
    for name in ("config.yaml", "trainer_log.jsonl"):
        shutil.copy(source / name, folder / name)
    result = evaluate(Segmenter(bundle), records, EvaluationOptions(text_check=6))
    result.write(folder / "eval" / "test")
    return folder


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_page_is_whole_and_self_contained(run: Path) -> None:
    page = parse(write_report(run))
    assert all(s.startswith(("data:", "#")) for s in page.sources)
    assert len(page.ids) == len(set(page.ids))
    known = {f"#{i}" for i in page.ids}
    assert all(s in known for s in page.sources if s.startswith("#"))
    for words in ("per-image mean", "pooled over pixels", "Decoding speed", "Best", "Median", "Worst", "confidence"):
        assert words in page.text
    assert "Parts of the loss" in page.text and "config.yaml" in page.text
    # Text of the data is escaped.
    assert 'Nothing, "really".' in page.text


def test_the_mask_is_shown_token_by_token(run: Path) -> None:
    _, bundle, _ = shared()
    rows, columns = bundle.sequence.mask_grid
    text = write_report(run).read_text(encoding="utf-8")
    section = text.split("The mask, token by token")[1].split("<h2>")[0]
    assert f"{rows} x {columns} tokens" in section and section.count("data:image/jpeg") == TOKEN_FRAMES


def test_contours_lie_where_the_probability_crosses_a_level() -> None:
    image = np.full((64, 64), 100, np.uint8)
    probability = np.repeat(np.linspace(0, 255, 32).round().astype(np.uint8)[None], 32, 0)
    picture = probability_contours(image, probability)
    for level, color in LEVELS:
        columns = np.flatnonzero((picture == color).all(-1)[20])
        # The line is where the level is first reached; the right border closes every contour.
        assert abs(columns[0] - level * 63) <= 2
    assert (picture[30, :8] == 100).all()


def test_tokens_appear_row_by_row() -> None:
    image, probability = np.full((60, 60), 100, np.uint8), np.full((16, 16), 255, np.uint8)
    blue = []
    for frame in token_frames(image, probability, (4, 4), 0.5):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(frame.split(",")[1]))).convert("RGB")).astype(int)
        blue.append((pixels[..., 2] - pixels[..., 0] > 60).mean())
    np.testing.assert_allclose(blue, [0.25, 0.5, 0.75, 1.0], atol=0.08)


def test_grey_report_has_no_colour_but_the_masks(run: Path) -> None:
    colour = np.zeros((20, 20, 3), np.uint8)
    colour[..., 0] = 200
    assert greyscale(colour).shape == (20, 20) and (greyscale(colour) == 60).all()
    assert parse(write_report(run, run / "grey.html", grey=True)).text


def test_an_older_result_is_told_to_be_made_again(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "run"
    shutil.copytree(run, old)
    (old / "eval" / "test" / "probability.npy").unlink()
    with pytest.raises(ValueError, match=r"must hold probability\.npy"):
        write_report(old)


def test_same_image_with_different_sentences_is_shown(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert "Same image, different sentences" in text
    section = text.split("Same image, different sentences")[1].split("<h2>By ")[0]
    assert "The left square." in section and "The right square." in section


def test_without_such_pairs_another_images_sentence_is_shown(tmp_path: Path) -> None:
    records, bundle, _ = shared()
    single = list({r.subject: r for r in records[1::2]}.values())
    result = evaluate(Segmenter(bundle), single, EvaluationOptions(text_check=6))
    result.write(tmp_path / "eval" / "test")
    page = parse(write_report(tmp_path, tmp_path / "deep" / "page.html"))
    assert "Same image, another sentence" in page.text
    assert "Training" not in page.text


def test_examples_are_best_median_and_worst(run: Path) -> None:
    text = write_report(run, examples=2).read_text(encoding="utf-8")
    shown = [float(x) for x in re.findall(r"<span>Dice ([\d.]+) · HD95", text)]
    assert len(shown) == 6
    assert min(shown[:2]) >= max(shown[2:4]) >= max(shown[4:])
    assert shown[4] <= shown[5]


def test_what_is_missing_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with neither"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"split must be .*test.* got 'val'"):
        write_report(run, split="val")
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    table = broken / "eval" / "test" / "cases.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("/img/", "/moved/"), encoding="utf-8")
    with pytest.raises(ValueError, match="no longer there"):
        write_report(broken)


def test_command(run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ntpseg.cli import app

    result = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r.html").stat().st_size > 20_000


def test_hidden_names_are_nowhere_in_the_page(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    table, summary = copy / "eval" / "test" / "cases.csv", copy / "eval" / "test" / "summary.json"
    rows = read_csv(table)
    for n, row in enumerate(rows):
        row.update(case=f"scan_Miller{n}", subject=f"Miller{n}", text=f"The left square of Miller{n}.")
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = json.loads(summary.read_text(encoding="utf-8"))
    found["data"] = "/home/Miller/data"
    found["groups"] = {f"Miller{n}": next(iter(found["groups"].values())) for n in range(len(rows))}
    summary.write_text(json.dumps(found), encoding="utf-8")
    (copy / "config.yaml").write_text("data:\n  path: Miller\n  table: /home/Miller.csv\n", encoding="utf-8")
    assert "Miller" in write_report(copy, examples=1).read_text(encoding="utf-8")
    page = parse(write_report(copy, examples=1, hide_names=True))
    assert "Miller" not in page.text and "(hidden)" in page.text
    assert re.search(r"case \d+", page.text) and re.search(r"The left square of subject \d+\.", page.text)
    text = (copy / "report.html").read_text(encoding="utf-8")
    assert "Miller" not in text
    assert all(Path(row[key]).stem not in text for row in rows for key in ("image", "mask"))
