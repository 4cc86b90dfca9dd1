"""A mask is read as its one class, as the class that is asked for, or refused with the classes that are there."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import picture, save, square, table
from PIL import Image
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.data import (
    MaskOptions,
    Record,
    check_records,
    inspect_dataset,
    load_records,
    read_image,
    read_mask,
    read_truth,
    read_windowed,
    usable_records,
)
from ntpseg.data.stats import split_stats
from ntpseg.losses.dense import pixel_loss, soft_dice_loss

run = CliRunner()

LABELS = np.zeros((24, 24), np.uint8)
LABELS[2:10, 2:10] = 1
LABELS[12:20, 3:8] = 2
LABELS[12:16, 14:22] = 3
# Seven values with the labels, all near to black.
NOISE = np.eye(24, dtype=np.uint8) * 9 + 3


def palette(pixels: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(pixels, mode="P")
    image.putpalette(colours)
    return image


def coloured(*colours: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(np.array(colours, np.uint8)[LABELS % len(colours)])


def write(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (Image.fromarray(LABELS), "1 (64 pixels), 2 (40 pixels), 3 (32 pixels)"),
        (Image.fromarray(LABELS * 85), "85 (64 pixels), 170 (40 pixels), 255 (32 pixels)"),
        (Image.fromarray(np.where(LABELS == 2, 255, LABELS % 2).astype(np.uint8)), "1 (96 pixels), 255 (40 pixels)"),
        (
            Image.fromarray(np.where(LABELS == 3, 255, LABELS + np.eye(24, dtype=np.uint8) * 9 + 3).astype(np.uint8)),
            "3 (",
        ),
        (Image.fromarray(LABELS.astype(np.uint16) * 1000), "1000 (64 pixels), 2000 (40 pixels)"),
        (Image.fromarray(LABELS.astype(np.float32)), "1 (64 pixels), 2 (40 pixels)"),
        (Image.fromarray(LABELS.astype(np.int32) - 1), "-1 (440 pixels)"),
        (Image.fromarray((LABELS > 0).astype(np.uint8) + 1), "1 (440 pixels), 2 (136 pixels)"),
        (palette(LABELS, [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]), "1 (64 pixels), 2 (40 pixels)"),
        (coloured((0, 0, 0), (255, 0, 0), (0, 255, 0)), "#ff0000 (64 pixels), #00ff00 (40 pixels)"),
        (coloured((255, 255, 255), (255, 0, 0)), "#ffffff (480 pixels), #ff0000 (96 pixels)"),
    ],
)
def test_several_classes_are_named_and_never_half_read(tmp_path: Path, image: Image.Image, named: str) -> None:
    path = write(tmp_path / "m.tif", image)
    with pytest.raises(ValueError, match=r"m\.tif must be a mask of one class, got several classes") as refused:
        read_mask(path)
    assert named in str(refused.value) and "mask_value" in str(refused.value)


@pytest.mark.parametrize(
    ("image", "value", "label"),
    [
        (Image.fromarray(LABELS), "2", 2),
        (Image.fromarray(LABELS), "2.0", 2),
        (Image.fromarray(LABELS * 85), "170", 2),
        (palette(LABELS, [0, 0, 0, 1, 1, 1, 255, 255, 255, 2, 2, 2]), "3", 3),
        (coloured((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)), "#00FF00", 2),
    ],
)
def test_a_class_can_be_chosen(tmp_path: Path, image: Image.Image, value: str, label: int) -> None:
    np.testing.assert_array_equal(read_mask(write(tmp_path / "m.png", image), value), label == LABELS)


def test_palette_masks_are_read_by_index_whatever_the_colours(tmp_path: Path) -> None:
    mask = LABELS == 1
    for colours in ([0, 0, 0, 5, 5, 5], [68, 1, 84, 253, 231, 37], [255, 255, 255, 0, 0, 0]):
        path = write(tmp_path / "p.png", palette(mask.astype(np.uint8), colours))
        np.testing.assert_array_equal(read_mask(path), mask)


@pytest.mark.parametrize("quality", [30, 75, 90, 95, 99])
def test_one_structure_with_smooth_or_compressed_edges_is_one_class(tmp_path: Path, quality: int) -> None:
    rows, columns = np.mgrid[:256, :256]
    disc = (rows - 120) ** 2 + (columns - 130) ** 2 < 60**2
    Image.fromarray(disc.astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=quality)
    smooth = Image.fromarray(disc.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.BOX)
    assert (read_mask(tmp_path / "m.jpg") != disc).mean() < 0.002
    np.testing.assert_array_equal(read_mask(write(tmp_path / "s.png", smooth)), np.asarray(smooth, float) * 2 >= 255)


def test_a_compressed_label_map_and_a_photograph_are_refused(tmp_path: Path) -> None:
    labels = (LABELS % 3).repeat(9, 0).repeat(9, 1) * 127
    Image.fromarray(labels).save(tmp_path / "l.jpg", quality=80)
    photograph = Image.fromarray(picture(64)).resize((256, 256), Image.Resampling.BICUBIC)
    for path in (tmp_path / "l.jpg", write(tmp_path / "photo.png", photograph)):
        with pytest.raises(ValueError, match="several grey levels"):
            read_mask(path)
        with pytest.raises(ValueError, match="mask_value must choose a label"):
            read_mask(path, "127")


def test_a_shape_in_black_on_transparency_is_its_alpha(tmp_path: Path) -> None:
    mask = LABELS == 1
    rgba = np.zeros((24, 24, 4), np.uint8)
    rgba[mask, 3] = 255
    np.testing.assert_array_equal(read_mask(write(tmp_path / "m.png", Image.fromarray(rgba))), mask)


def test_nan_in_a_mask_is_refused(tmp_path: Path) -> None:
    values = (LABELS == 1).astype(np.float32)
    values[0, :2] = np.nan
    with pytest.raises(ValueError, match="2 NaN or infinite pixels"):
        read_mask(write(tmp_path / "m.tif", Image.fromarray(values)))


def with_mask(good: Path, pixels: np.ndarray) -> Path:
    save(good / "Train_Folder" / "labelcol" / "mask_a.png", pixels)
    return good


def test_check_names_the_classes_and_the_option_chooses(good: Path) -> None:
    labels = square() // 255
    labels[10:14, 10:14] = 2
    with_mask(good, labels)
    (problem,) = check_records(good)
    assert problem.kind == "several classes" and "1 (16 pixels), 2 (16 pixels)" in problem.detail
    for folder in good.glob("*/labelcol"):
        for path in folder.iterdir():
            save(path, labels)
    records, _ = usable_records(good, masks=MaskOptions(mask_value="2"))
    assert [read_truth(r).sum() for r in records] == [16, 16, 16] and read_truth(records[0])[12, 12]
    assert run.invoke(app, ["data", "check", str(good), "--mask-value", "2"]).exit_code == 0
    assert "there is 1, 2" in check_records(good, masks=MaskOptions(mask_value="7"))[0].detail
    with pytest.raises(ValueError, match="mask_value must be a number or a colour"):
        MaskOptions(mask_value="lung")


def test_mask_value_column_of_a_manifest(tmp_path: Path) -> None:
    save(tmp_path / "i.png", picture(24))
    save(tmp_path / "m.png", LABELS)
    rows = [
        {"image": "i.png", "mask": "m.png", "text": "The lung.", "split": "train", "mask_value": str(value)}
        for value in (1, 3)
    ]
    table(tmp_path / "manifest.csv", rows)
    records, problems = usable_records(tmp_path)
    assert problems == [] and len({record.case for record in records}) == 2
    for record, value in zip(records, (1, 3)):
        np.testing.assert_array_equal(read_truth(record), value == LABELS)
    assert split_stats(records)[0].area[1] == pytest.approx((64 + 32) / 2 / 24**2)
    table(tmp_path / "manifest.csv", [rows[0] | {"mask_value": "lung"}])
    assert [problem.kind for problem in check_records(tmp_path)] == ["malformed row"]


def test_one_noise_pixel_is_not_a_finding(good: Path) -> None:
    noise = np.zeros((16, 16), np.uint8)
    noise[3, 3] = 255
    (problem,) = check_records(with_mask(good, noise))
    assert problem.kind == "empty mask" and "only 1 of its pixels is foreground, fewer than 4" in problem.detail
    checked = inspect_dataset(good, masks=MaskOptions(keep_empty=True))
    assert checked.negatives == 1 and not read_truth(checked.records[0]).any()
    assert [note.kind for note in checked.notes] == ["case without a finding"]


@pytest.mark.parametrize("layout", ["lvit", "languide", "manifest"])
def test_cases_without_a_finding_are_kept_on_request(tmp_path: Path, layout: str) -> None:
    places = {
        "lvit": ("Train_Folder/img", "Train_Folder/labelcol", "Train_Folder/Train_text.csv"),
        "languide": ("Train/Images", "Train/GTs", "prompt/train.csv"),
        "manifest": ("i", "m", "manifest.csv"),
    }[layout]
    rows = []
    for number in range(5):
        save(tmp_path / places[0] / f"{number}.png", picture())
        save(tmp_path / places[1] / f"{number}.png", square() * (number > 1))
        named = {"Image": f"{number}.png", "Description": "The lung."}
        paths = {"image": f"i/{number}.png", "mask": f"m/{number}.png", "text": "The lung.", "split": "train"}
        rows.append(paths if layout == "manifest" else named)
    table(tmp_path / places[2], rows)
    assert [problem.kind for problem in check_records(tmp_path)] == ["empty mask"] * 2
    records, problems = usable_records(tmp_path, masks=MaskOptions(keep_empty=True))
    assert (len(records), problems) == (5, [])
    assert sum(row.negatives for row in split_stats(records)) == 2
    shown = run.invoke(app, ["data", "check", str(tmp_path), "--keep-empty"])
    assert shown.exit_code == 0 and "2 of the pairs hold no finding" in shown.output


def test_losses_on_pixels_are_defined_for_an_empty_mask() -> None:
    empty = torch.zeros(2, 8, 8)
    for level, low, high in ((-30.0, 0.0, 1e-6), (0.0, 0.9, 2.0)):
        logits = torch.full((2, 8, 8), level, requires_grad=True)
        for loss in (soft_dice_loss(logits.sigmoid(), empty), pixel_loss(logits, empty)):
            assert ((loss >= low) & (loss <= high)).all()
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert gradient.isfinite().all()


def test_inverted_masks_are_noted(good: Path) -> None:
    checked = inspect_dataset(with_mask(good, 255 - square()))
    assert checked.problems == []
    (note,) = checked.notes
    assert note.kind == "mostly foreground" and "94 % is foreground" in note.detail


def test_exif_orientation_is_applied_to_image_and_mask_alike(good: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise
    pixels, mask = picture(16)[:8], square(16)[:8]
    for folder, name, stored in (("img", "a", pixels), ("labelcol", "mask_a", mask)):
        path = good / "Train_Folder" / folder / f"{name}.png"
        path.unlink()
        Image.fromarray(stored).save(path, exif=exif)
    assert check_records(good) == []
    record = next(r for r in load_records(good) if r.case == "a")
    np.testing.assert_array_equal(read_image(record.image), np.rot90(pixels, -1))
    np.testing.assert_array_equal(read_truth(record), np.rot90(mask > 0, -1))
    # Only one of the two turned: the sizes do not fit, or the square pair is noted.
    Image.fromarray(mask).save(good / "Train_Folder" / "labelcol" / "mask_a.png")
    assert "EXIF orientation of the image was applied" in check_records(good)[0].detail
    Image.fromarray(picture()).save(record.image, exif=exif)
    assert [n.kind for n in inspect_dataset(with_mask(good, square())).notes] == ["turned image"]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_hot_pixel_does_not_flatten_a_deep_image(good: Path, dtype: type) -> None:
    ramp = (300 + 12 * np.arange(256).reshape(16, 16)).astype(dtype)
    path = good / "Train_Folder" / "img" / "a.tif"
    (good / "Train_Folder" / "img" / "a.png").unlink()
    Image.fromarray(ramp).save(path)
    clean = read_image(path)
    hot = ramp.copy()
    hot[0, 0] = 65535
    Image.fromarray(hot).save(path)
    burnt, window = read_windowed(path)
    assert np.abs(burnt.astype(int) - clean)[1:].max() <= 3 and burnt[0, 0] == 255
    assert window is not None and (window.low, window.high) == (312 + 12, ramp.max()) and window.has_outliers
    checked = inspect_dataset(good)
    assert checked.problems == [] and [n.kind for n in checked.notes] == ["pixels far outside"]
    assert f"324..{ramp.max():g} is stretched to 0..255" in checked.notes[0].detail


def test_a_deep_image_that_is_nearly_constant_keeps_its_range(tmp_path: Path) -> None:
    sparse = np.zeros((40, 40), np.uint16)
    sparse[3, 4:8] = 4000
    image = read_image(write(tmp_path / "x.png", Image.fromarray(sparse)))
    assert set(np.unique(image)) == {0, 255} and (image == 255).sum() == 4


def test_images_without_a_finite_pixel_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have finite pixels"):
        read_image(write(tmp_path / "x.tif", Image.fromarray(np.full((4, 4), np.nan, np.float32))))


@pytest.mark.parametrize("size", [(13000, 13000), (8193, 8192), (23000, 23000)])
def test_large_images_are_refused_before_they_are_decoded(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "huge.png", Image.new("1", size))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (read_image, read_mask):
            with pytest.raises(ValueError, match=r"huge\.png must have at most 67,108,864 pixels"):
                read(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.png", b"", "empty one (0 bytes)"),
        ("a.png", b"<!DOCTYPE html><html>", "web page"),
        ("a.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        ("a.png", b"\0" * 128 + b"DICM" + b"\0" * 20, "must hold a DICOM image"),
        ("a.tif", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    ],
)
def test_other_files_under_an_images_name(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refused:
        read_image(tmp_path / name)
    assert words in str(refused.value) and name in str(refused.value)


def test_pages_and_folders_are_refused_and_thumbnails_are_not(tmp_path: Path) -> None:
    page = Image.fromarray(picture(32))
    page.save(tmp_path / "stack.tif", save_all=True, append_images=[page])
    page.save(tmp_path / "small.tif", save_all=True, append_images=[page.resize((8, 8))])
    with pytest.raises(ValueError, match="several pages"):
        read_image(tmp_path / "stack.tif")
    assert read_image(tmp_path / "small.tif").shape == (32, 32)
    with pytest.raises(ValueError, match="got a folder"):
        read_image(tmp_path)


def test_wrong_extension_is_read_by_content(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png", format="BMP")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture())


def test_truth_of_a_record_without_mask_is_refused(tmp_path: Path) -> None:
    make: Callable[..., Record] = Record
    with pytest.raises(ValueError, match="record 'a' must have a mask"):
        read_truth(make(tmp_path, None, "T", "train", "a", "a"))


@pytest.mark.parametrize(("kind", "colour"), [("grey", 0), ("rgb", 2), ("grey-alpha", 4), ("rgba", 6)])
def test_sixteen_bits_are_read_whole_or_refused(tmp_path: Path, kind: str, colour: int) -> None:
    """Pillow keeps the high byte of colours alone: 12 bits of a detector would become 16 shades."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    values = np.linspace(0, 4095, 64).astype(">u2").reshape(8, 8, 1).repeat(channels, 2)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    if kind == "grey":
        assert len(np.unique(read_image(path))) == 64
        return
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=r"a\.png must have 8 bits a channel, or be grey with 16, got 16 bits of"):
            read(path)
