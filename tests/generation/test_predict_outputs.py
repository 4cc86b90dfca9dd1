"""``ntpseg predict`` destroys nothing: no input is replaced, no result written twice, no image costs the others."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_segmenter import TEXTS, shared
from typer.testing import CliRunner

from ntpseg.cli import app, main
from ntpseg.data import resize_probability
from ntpseg.generation import Segmenter
from ntpseg.generation.folder import folder_jobs
from ntpseg.generation.overlay import LEVELS
from ntpseg.generation.uncertainty import pixel_entropy
from ntpseg.utils.files import read_csv


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", "--model", str(shared()[2]), *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, ValueError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before a model is loaded."""
    monkeypatch.setattr(Segmenter, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with three different images."""
    folder = tmp_path / "imgs"
    folder.mkdir()
    for record, name in zip(shared()[0][::3], ("a.png", "b.png", "c.png"), strict=False):
        shutil.copy(record.image, folder / name)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("spelling", ["{}", "{}/.", "{}/../imgs", "link"])
@pytest.mark.parametrize("option", ["--out", "--overlay"])
def test_the_folder_of_the_images_is_no_output(images: Path, tmp_path: Path, spelling: str, option: str) -> None:
    (tmp_path / "link").symlink_to(images)
    before = content(images)
    place = tmp_path / "link" if spelling == "link" else spelling.format(images)
    outputs = {"--out": tmp_path / "o", option: place}
    message = refused("--image", images, "--text", "x", *(x for pair in outputs.items() for x in pair))
    assert f"{option} must not be the folder of the images" in message
    assert content(images) == before


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("kind", ["itself", "symlink", "hardlink", "folder"])
@pytest.mark.parametrize("option", ["--out", "--overlay"])
def test_a_single_image_is_no_output(images: Path, tmp_path: Path, kind: str, option: str) -> None:
    image, place = images / "a.png", tmp_path / "m.png"
    if kind == "symlink":
        place.symlink_to(image)
    elif kind == "hardlink":
        os.link(image, place)
    else:
        place = image if kind == "itself" else images
    before = content(images)
    outputs = {"--out": tmp_path / "o.png", option: place}
    message = refused("--image", image, "--text", "x", *(x for pair in outputs.items() for x in pair))
    assert "must not replace what is read" in message and content(images) == before


@pytest.mark.usefixtures("no_decoding")
def test_other_inputs_are_no_outputs(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.link(images / "b.png", out / "a.png")
    message = refused("--image", images, "--text", "x", "--out", out)
    assert "out/a.png, which is the input" in message and "b.png" in message
    table = tmp_path / "o" / "predictions.csv"
    table.parent.mkdir()
    table.write_text("image,text\na.png,x\n")
    assert "must not replace what is read" in refused("--image", images, "--texts", table, "--out", table.parent)
    # The image of another name in the folder into which a single mask goes.
    Image.open(images / "a.png").save(images / "d.jpg")
    Image.open(images / "b.png").save(images / "d.png")
    assert "must not replace what is read" in refused("--image", images / "d.jpg", "--text", "x", "--out", images)
    run = tmp_path / "run"
    shutil.copytree(shared()[2], run)
    os.link(run / "model" / "config.json", tmp_path / "config.png")
    arguments = ["--image", str(images / "a.png"), "--text", "x", "--out", str(tmp_path / "config.png")]
    result = CliRunner().invoke(app, ["predict", "--model", str(run), *arguments])
    assert "must not replace what is read" in str(result.exception)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("text", ["", "  ", "nan", "N/A", "-"])
def test_a_sentence_is_one(images: Path, tmp_path: Path, text: str) -> None:
    for image in (images, images / "a.png"):
        assert "text must be a sentence" in refused("--image", image, "--text", text, "--out", tmp_path / "o.png")


def test_a_link_to_nothing_is_listed(images: Path, tmp_path: Path) -> None:
    (images / "d.png").symlink_to(tmp_path / "nowhere.png")
    result = invoke("--image", images, "--text", TEXTS[0], "--out", tmp_path / "o")
    assert result.exit_code == 1 and "d.png" in result.stderr
    assert {p.name for p in (tmp_path / "o").glob("*.png")} == {"a.png", "b.png", "c.png"}


def test_the_window_of_a_deep_image_is_recorded(images: Path, tmp_path: Path) -> None:
    """One burnt-out pixel does not flatten the picture: the mask is that of the picture without it."""
    picture = np.asarray(Image.open(images / "a.png").convert("L")).astype(np.uint16) * 16
    Image.fromarray(picture).save(images / "a.png")
    picture[0, 0] = 65535
    Image.fromarray(picture).save(images / "b.png")
    result = invoke("--image", images, "--text", TEXTS[0], "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    windows = {row["image"]: row["window"] for row in read_csv(tmp_path / "o" / "predictions.csv")}
    assert windows["a.png"] == windows["b.png"] != "" and windows["c.png"] == ""
    masks = [np.asarray(Image.open(tmp_path / "o" / name)) for name in ("a.png", "b.png")]
    assert np.mean(masks[0] != masks[1]) < 0.01
    single = invoke("--image", images / "b.png", "--text", TEXTS[0], "--out", tmp_path / "b.png")
    assert f"grey levels {windows['b.png']} of the image" in " ".join(single.output.split())


def test_every_image_gets_a_mask_of_its_own(images: Path, tmp_path: Path) -> None:
    names = {"a.jpg": "a", "a.png": "a_3", "a_2.png": "a_2", "B.png": "B", "b.png": "b_2"}
    shutil.rmtree(images)
    images.mkdir()
    for name, record in zip(names, shared()[0][::2], strict=False):
        Image.open(record.image).save(images / name)
    assert {job.image.name: job.name for job in folder_jobs(images, "x", None)} == names
    result = invoke("--image", images, "--text", TEXTS[0], "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    with (tmp_path / "o" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        listed = {row["image"]: row["mask"] for row in csv.DictReader(file)}
    assert listed == {image: f"{mask}.png" for image, mask in names.items()}
    assert {p.name for p in (tmp_path / "o").glob("*.png")} == set(listed.values())
    segmenter = Segmenter.from_pretrained(shared()[2])
    for image, mask in listed.items():
        written = np.asarray(Image.open(tmp_path / "o" / mask)) > 0
        np.testing.assert_array_equal(written, segmenter.segment(images / image, TEXTS[0]).mask)


@pytest.mark.usefixtures("no_decoding")
def test_an_overlay_does_not_take_the_masks_place(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    for exists in (False, True):
        assert "must not be the folder of the masks" in refused(
            *("--image", images, "--text", "x", "--out", out, "--overlay", tmp_path / "x" / ".." / "o")
        )
        for overlay in (out / "m.png", out / "M.PNG"):
            assert "a file of its own" in refused(
                *("--image", images / "a.png", "--text", "x", "--out", out / "m.png", "--overlay", overlay)
            )
        assert "a file of its own" in refused(
            "--image", images / "a.png", "--text", "x", "--out", out, "--overlay", out
        )
        if not exists:
            out.mkdir()


def test_one_broken_image_costs_the_others_nothing(images: Path, tmp_path: Path) -> None:
    whole = (images / "b.png").read_bytes()
    (images / "b.png").write_bytes(whole[: len(whole) // 2])
    (images / "d.png").write_bytes(b"no image")
    (images / "e.png").touch()
    result = invoke("--image", images, "--text", TEXTS[0], "--out", tmp_path / "o", "--overlay", tmp_path / "v")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"a.png", "c.png", "predictions.csv"}
    assert {p.name for p in (tmp_path / "v").iterdir()} == {"a.png", "c.png"}
    for name in ("b.png: ", "d.png: ", "e.png: "):
        assert name in result.stderr
    assert "3 of 5 images could not be read" in result.stderr and "2 masks" in result.stdout
    assert len((tmp_path / "o" / "predictions.csv").read_text().splitlines()) == 3


def test_only_broken_images_give_no_table(images: Path, tmp_path: Path) -> None:
    for path in images.iterdir():
        path.write_bytes(b"")
    result = invoke("--image", images, "--text", "x", "--out", tmp_path / "o")
    assert result.exit_code == 1 and not (tmp_path / "o").exists()
    assert "must be a readable image file" in refused("--image", images / "a.png", "--text", "x", "--out", tmp_path)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("name", ["m.jpg", "m.JPEG", "m.tif", "m.webp", "m.gif", "m.txt", "m.v2"])
@pytest.mark.parametrize("option", ["--out", "--overlay"])
def test_masks_are_png(images: Path, tmp_path: Path, name: str, option: str) -> None:
    outputs = {"--out": tmp_path / "o.png", option: tmp_path / name}
    message = refused("--image", images / "a.png", "--text", "x", *(x for pair in outputs.items() for x in pair))
    assert f"{option} must be a folder or end in .png" in message and name in message


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_takes_a_single_mask(images: Path, tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    result = invoke("--image", images / "a.png", "--text", "x", "--out", out, "--overlay", tmp_path / "drawn")
    assert result.exit_code == 0, result.output
    assert content(out).keys() == {"a.png"} == content(tmp_path / "drawn").keys()
    assert "out/a.png" in result.output.replace("\n", "")


@pytest.mark.usefixtures("no_decoding")
def test_a_file_takes_no_folder_of_images(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "o"
    file.write_text("mine")
    for option, place in (("--out", file), ("--out", tmp_path / "new.png"), ("--overlay", file), ("--out", file / "x")):
        outputs = {"--out": tmp_path / "masks", option: place}
        message = refused("--image", images, "--text", "x", *(x for pair in outputs.items() for x in pair))
        assert f"{option} must be a folder" in message
    (tmp_path / "masks" / "a.png").mkdir(parents=True)
    assert "no folder of a result's name" in refused("--image", images, "--text", "x", "--out", tmp_path / "masks")
    assert file.read_text() == "mine"


def test_earlier_results_are_replaced_and_nothing_else(images: Path, tmp_path: Path) -> None:
    out, drawn = tmp_path / "o", tmp_path / "v"
    arguments = ("--image", images, "--text", TEXTS[0], "--out", out, "--overlay", drawn, "--save-probabilities")
    assert invoke(*arguments).exit_code == 0
    (out / "mine.txt").write_text("mine")
    before = content(tmp_path)
    # Of a run that was killed there is no table.
    (out / "predictions.csv").unlink()
    assert invoke(*arguments).exit_code == 0
    assert content(tmp_path) == before
    # Another program, or an earlier release, left no mark, but the table names the mask.
    link = tmp_path / "kept.png"
    link.write_bytes(b"kept")
    (out / "b.png").unlink()
    (out / "b.png").symlink_to(link)
    (out / "c.png").write_bytes(b"old")
    assert invoke(*arguments).exit_code == 0
    assert link.read_bytes() == b"kept" and not (out / "b.png").is_symlink()
    assert content(tmp_path) == before | {"kept.png": b"kept"}


def test_one_image_has_its_own_mask_replaced(images: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "m.png", tmp_path / "folder"):
        arguments = ("--image", images / "a.png", "--text", TEXTS[0], "--out", out, "--overlay", tmp_path / "v.png")
        for _ in range(2):
            assert invoke(*arguments, "--save-probabilities").exit_code == 0
        assert invoke(*arguments).exit_code == 0


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("name", ["a.png", "predictions.csv", "a_probability.png", "overlay/a.png"])
def test_what_no_prediction_wrote_is_not_replaced(images: Path, tmp_path: Path, name: str) -> None:
    """Ground truth, say: masks that have their images' names in a folder beside them."""
    masks = tmp_path / "masks"
    (masks / name).parent.mkdir(parents=True)
    if name.endswith(".csv"):
        (masks / name).write_text("image,text,mask\na.png,x,b.png\n")
    else:
        shutil.copy(images / "c.png", masks / name)
    before = content(tmp_path)
    overlay = ("--overlay", masks / "overlay")
    for image in (images, images / "a.png"):
        if image.is_dir() or not name.endswith(".csv"):
            given = ("--image", image, "--text", "x", "--out", masks, "--save-probabilities")
            message = refused(*given, *(overlay if "overlay" in name else ()))
            assert "must replace results of an earlier prediction alone, got" in message and name in message
            assert content(tmp_path) == before
    if name == "a.png":
        assert "results of an earlier" in refused("--image", images / "b.png", "--text", "x", "--out", masks / "a.png")
        result = CliRunner().invoke(app, ["predict", "--help"], env={"COLUMNS": "200"})
        assert "other files never" in result.output
    assert content(tmp_path) == before


def test_a_foreign_mask_ends_the_command_with_status_2(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "masks").mkdir()
    truth = shutil.copy(images / "c.png", tmp_path / "masks" / "a.png").read_bytes()
    arguments = ["--image", str(images), "--text", "x", "--out", str(tmp_path / "masks")]
    monkeypatch.setattr("sys.argv", ["ntpseg", "predict", "--model", str(shared()[2]), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "give another folder or name" in capsys.readouterr().err
    assert content(tmp_path / "masks") == {"a.png": truth}


@pytest.mark.usefixtures("no_decoding")
def test_names_that_no_file_can_have_are_refused_before_decoding(images: Path, tmp_path: Path) -> None:
    long = "ü" * 126  # 252 bytes
    shutil.move(images / "a.png", images / f"{long[:125]}.png")
    shutil.copy(images / "b.png", images / f"{long[:125]}.bmp")
    message = refused("--image", images, "--text", "x", "--out", tmp_path / "o")
    assert "--image must have names of at most 255 bytes" in message and "got 256" in message
    for option in ("--out", "--overlay"):
        outputs = {"--out": tmp_path / "o.png", option: tmp_path / f"{long}.png"}
        message = refused("--image", images / "b.png", "--text", "x", *(x for pair in outputs.items() for x in pair))
        assert f"{option} must have names of at most 255 bytes" in message and "got 256" in message


def test_a_name_of_255_bytes_is_written(images: Path, tmp_path: Path) -> None:
    name = "ü" * 125 + "a.png"
    (images / "a.png").rename(images / name)
    assert invoke("--image", images / name, "--text", "x", "--out", tmp_path / "o").exit_code == 0
    assert [p.name for p in (tmp_path / "o").iterdir()] == [name]


def test_a_name_that_is_no_utf8_is_written(images: Path, tmp_path: Path) -> None:
    try:
        os.rename(images / "a.png", os.fsencode(images) + b"/\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    result = invoke("--image", images, "--text", "x", "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    assert b"\xe9.png" in os.listdir(os.fsencode(tmp_path / "o"))
    assert "\\xe9.png" in (tmp_path / "o" / "predictions.csv").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_refused_before_decoding(
    images: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(dir: Path) -> Any:
        raise OSError(code, os.strerror(code), str(dir))

    monkeypatch.setattr("ntpseg.utils.outputs.tempfile.TemporaryFile", deny)
    for image, out in ((images, tmp_path / "o"), (images / "a.png", tmp_path / "o.png")):
        message = refused("--image", image, "--text", "x", "--out", out)
        assert "--out must be where files can be written" in message and "get the right to write there" in message


@pytest.mark.parametrize("folder", [True, False])
def test_a_full_disk_is_one_line_and_keeps_what_was_written(
    images: Path, tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real, calls = tmp_path / "o", os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > (2 if folder else 0):  # the first mask's file and folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr("ntpseg.utils.files.os.fsync", full)
    arguments = ["--image", str(images if folder else images / "a.png"), "--text", "x", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["ntpseg", "predict", "--model", str(shared()[2]), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert "No space left on device" in lines[-1] and "free space" in lines[-1] and str(out) in lines[-1]
    assert sorted(content(out)) == (["a.png"] if folder else [])


def test_a_device_that_is_not_here_is_one_line(images: Path, tmp_path: Path) -> None:
    import torch

    absent = "cuda" if not torch.cuda.is_available() else "cuda:99"
    for name in (absent, "meta", "tpu", "cpu:x", ""):
        arguments = ("--image", images, "--text", "x", "--out", tmp_path / "o", "--device", name)
        message = refused(*arguments)
        assert f"got {name!r}" in message and "ntpseg env" in message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("model.safetensors", "cut"),
        ("model.safetensors", "gone"),
        ("model.safetensors", "empty"),
        ("config.json", "cut"),
        ("config.json", "gone"),
        ("sequence.json", "cut"),
        ("sequence.json", "gone"),
        ("vision/model.safetensors", "cut"),
        ("vision/config.json", "gone"),
        ("text/tokenizer.json", "cut"),
    ],
)
def test_a_broken_model_names_file_and_cure(images: Path, tmp_path: Path, file: str, kind: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(shared()[2], run)
    path = run / "model" / file
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if kind == "cut" else b"")
    result = CliRunner().invoke(
        app, ["predict", "--model", str(run), "--image", str(images), "--text", "x", "--out", str(tmp_path / "o")]
    )
    assert isinstance(result.exception, ValueError)
    message = str(result.exception)
    assert str(path) in message and "copy it again" in message and "\n" not in message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "folder", "missing", "flipped"])
def test_what_is_no_model_is_one_line(images: Path, tmp_path: Path, kind: str) -> None:
    from ntpseg.models.archive import pack_bundle

    path = tmp_path / "model.zip"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        whole = pack_bundle(shared()[2] / "model", path, "card").read_bytes()
        flipped = whole[:5000] + bytes(255 - b for b in whole[5000:5100]) + whole[5100:]
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b"", "flipped": flipped}[kind])
    result = CliRunner().invoke(
        app, ["predict", "--model", str(path), "--image", str(images), "--text", "x", "--out", str(tmp_path / "o")]
    )
    assert isinstance(result.exception, ValueError), result.exception
    assert str(path) in str(result.exception) and "\n" not in str(result.exception)


def test_maps_lie_beside_the_masks(images: Path, tmp_path: Path) -> None:
    """Probability and entropy at the image's own size, and lines of equal probability in the overlay."""
    out, drawn = tmp_path / "o", tmp_path / "v"
    options = ("--text", TEXTS[0], "--method", "sample", "--samples", "3", "--temperature", "2", "--seed", "4")
    result = invoke("--image", images, *options, "--out", out, "--overlay", drawn, "--save-probabilities")
    assert result.exit_code == 0, result.output
    names = [f"{stem}{kind}.png" for stem in "abc" for kind in ("", "_probability", "_uncertainty")]
    assert sorted(p.name for p in out.glob("*.png")) == sorted(names)
    fields = {"method": "sample", "samples": 3, "temperature": 2.0, "seed": 4}
    segmenter = Segmenter.from_pretrained(shared()[2], **fields)
    for row in read_csv(out / "predictions.csv"):
        prediction = segmenter.segment(images / row["image"], TEXTS[0])
        stem = Path(row["mask"]).stem
        soft = resize_probability(prediction.probability, *prediction.mask.shape)
        for kind, values in (("probability", soft), ("uncertainty", pixel_entropy(soft))):
            written = np.asarray(Image.open(out / f"{stem}_{kind}.png"))
            np.testing.assert_allclose(written / 255, values, atol=0.6 / 255)
        assert float(row["mean_entropy"]) == pytest.approx(prediction.entropy.mean(), abs=1e-3)
        assert float(row["sample_dice"]) == pytest.approx(prediction.sample_dice, abs=1e-3)
        picture = np.asarray(Image.open(drawn / row["mask"]))
        for level, color in LEVELS:
            assert (picture == color).all(-1).any() == (soft >= level).any()


def test_one_image_has_its_maps_beside_its_mask(images: Path, tmp_path: Path) -> None:
    result = invoke(
        "--image", images / "a.png", "--text", TEXTS[0], "--out", tmp_path / "m.png", "--save-probabilities"
    )
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.glob("m*")} == {"m.png", "m_probability.png", "m_uncertainty.png"}
    plain = invoke("--image", images / "a.png", "--text", TEXTS[0], "--out", tmp_path / "n.png")
    assert plain.exit_code == 0 and {p.name for p in tmp_path.glob("n*")} == {"n.png"}
    assert (tmp_path / "n.png").read_bytes() == (tmp_path / "m.png").read_bytes()


@pytest.mark.usefixtures("no_decoding")
def test_a_map_takes_the_place_of_no_mask_image_or_overlay(images: Path, tmp_path: Path) -> None:
    given = ("--text", "x", "--save-probabilities")
    shutil.copy(images / "b.png", images / "a_probability.png")
    before = content(images)
    assert "a file of its own" in refused("--image", images, *given, "--out", tmp_path / "o")
    Image.open(images / "a.png").save(images / "d.jpg")
    (images / "d_uncertainty.png").write_bytes((images / "b.png").read_bytes())
    before = content(images)
    assert "must not replace what is read" in refused("--image", images / "d.jpg", *given, "--out", images)
    out, overlay = tmp_path / "m.png", tmp_path / "m_probability.png"
    assert "a file of its own" in refused("--image", images / "b.png", *given, "--out", out, "--overlay", overlay)
    assert content(images) == before
