"""Every pixel format is read to the same picture and the same mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ntpseg.data import prepare, read_image, read_mask, resize_mask, write_png

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
MASK = np.zeros((6, 8), bool)
MASK[1:4, 2:7] = True


def save(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".pgm", ".webp"])
def test_eight_bit_grey_is_unchanged(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(GREY).save(tmp_path / f"x{suffix}", **options)
    np.testing.assert_array_equal(read_image(tmp_path / f"x{suffix}"), GREY)


def test_rgb_is_unchanged_and_grey_rgb_becomes_grey(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(tmp_path / "c.png", Image.fromarray(COLOUR))), COLOUR)
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", Image.fromarray(GREY).convert("RGB"))), GREY)


def test_rgba_transparency_is_black(tmp_path: Path) -> None:
    alpha = np.full((6, 8), 255, np.uint8)
    alpha[0] = 0
    rgba = np.dstack([COLOUR, alpha])
    image = read_image(save(tmp_path / "x.png", Image.fromarray(rgba)))
    assert (image[0] == 0).all()
    np.testing.assert_array_equal(image[1:], COLOUR[1:])


def test_grey_with_alpha(tmp_path: Path) -> None:
    layered = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (8, 6), 255)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "x.png", layered)), GREY)


def test_palette_is_resolved(tmp_path: Path) -> None:
    indexed = Image.fromarray((np.arange(48) % 3).astype(np.uint8).reshape(6, 8), mode="P")
    indexed.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 255])
    image = read_image(save(tmp_path / "x.png", indexed))
    np.testing.assert_array_equal(image[0, :3], [[10, 20, 30], [200, 100, 50], [0, 0, 255]])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_stretched(tmp_path: Path, suffix: str) -> None:
    deep = 1000 + 16 * np.arange(48, dtype=np.uint16).reshape(6, 8)
    image = read_image(save(tmp_path / f"x{suffix}", Image.fromarray(deep)))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.rint(np.arange(48).reshape(6, 8) * 255 / 47))


def test_sixteen_bit_file_with_eight_bit_values_keeps_them(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(GREY.astype(np.uint16)))
    np.testing.assert_array_equal(read_image(path), GREY)


def test_float_image_with_nan(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 48, dtype=np.float32).reshape(6, 8)
    values[0, 1] = np.nan
    image = read_image(save(tmp_path / "x.tif", Image.fromarray(values)))
    assert (image[0, 0], image[-1, -1]) == (0, 255)


def test_constant_deep_image_is_black(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(np.full((6, 8), 4000, np.uint16)))
    assert (read_image(path) == 0).all()


def palette_mask() -> Image.Image:
    image = Image.fromarray(MASK.astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def alpha_mask() -> Image.Image:
    return Image.merge("RGBA", [Image.new("L", (8, 6), 255)] * 3 + [Image.fromarray(MASK.astype(np.uint8) * 255)])


MASKS = {
    "0/1": Image.fromarray(MASK.astype(np.uint8)),
    "0/255": Image.fromarray(MASK.astype(np.uint8) * 255),
    "0/128": Image.fromarray(MASK.astype(np.uint8) * 128),
    "1 bit": Image.fromarray(MASK),
    "16 bit 0/1": Image.fromarray(MASK.astype(np.uint16)),
    "16 bit 0/65535": Image.fromarray(MASK.astype(np.uint16) * 65535),
    "RGB": Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGB"),
    "RGB 0/1": Image.fromarray(MASK.astype(np.uint8)).convert("RGB"),
    "one colour": Image.fromarray(np.dstack([MASK * 255, MASK * 0, MASK * 0]).astype(np.uint8)),
    "RGBA": Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGBA"),
    "alpha": alpha_mask(),
    "palette": palette_mask(),
}


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask(tmp_path: Path, kind: str) -> None:
    mask = read_mask(save(tmp_path / "m.png", MASKS[kind]))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, MASK)


def test_jpeg_masks(tmp_path: Path) -> None:
    large = MASK.repeat(8, 0).repeat(8, 1)
    Image.fromarray(large.astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=90)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.jpg"), large)


def test_mask_with_noise_and_soft_edges(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 60, MASK.shape)
    soft = np.where(MASK, 255 - noise, noise).astype(np.uint8)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", Image.fromarray(soft))), MASK)


def test_empty_and_full_masks(tmp_path: Path) -> None:
    assert not read_mask(save(tmp_path / "e.png", Image.new("L", (5, 4)))).any()
    assert read_mask(save(tmp_path / "f.png", Image.new("L", (5, 4), 255))).all()


def test_utf8_names(tmp_path: Path) -> None:
    path = save(tmp_path / "легкое 肺 é.png", Image.fromarray(GREY))
    np.testing.assert_array_equal(read_image(path), GREY)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_file_names_itself(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=r"bad\.png"):
            read(path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    path = save(tmp_path / "cut.png", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png"):
        read_image(path)


def test_arrays_may_be_written_to(tmp_path: Path) -> None:
    for image in (Image.fromarray(GREY), Image.fromarray(COLOUR), Image.fromarray(GREY.astype(np.uint16) * 9)):
        read_image(save(tmp_path / "x.png", image))[0] = 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pixels", [GREY, COLOUR])
def test_prepare_shapes_and_range(pixels: np.ndarray, channels: int) -> None:
    image, mask = prepare(pixels, MASK, 4, channels)
    assert (image.shape, image.dtype) == ((channels, 4, 4), np.float32)
    assert mask is not None
    assert (mask.shape, mask.dtype) == ((1, 4, 4), np.float32)
    assert set(np.unique(mask)) <= {0.0, 1.0}
    assert image.min() >= -1 and image.max() <= 1


def test_prepare_maps_black_and_white_and_keeps_size() -> None:
    pixels = np.zeros((4, 4), np.uint8)
    pixels[0, 0] = 255
    image, mask = prepare(pixels, None, 4, 1)
    assert mask is None
    assert (image[0, 0, 0], image[0, 3, 3]) == (1.0, -1.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((GREY, MASK, 0, 1), "size must be an integer >= 1, got 0"),
        ((GREY, MASK, 4, 2), "channels must be one of 1, 3, got 2"),
        ((GREY, MASK[:3], 4, 1), "mask must have the image's size"),
        ((GREY.astype(np.float32), MASK, 4, 1), "image must be .* got float32"),
    ],
)
def test_prepare_refuses(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        prepare(*arguments)


def test_resize_mask_there_and_back() -> None:
    mask = np.zeros((32, 48), bool)
    mask[8:24, 12:36] = True
    small = resize_mask(mask, 16, 16)
    assert small.shape == (16, 16)
    back = resize_mask(small, 32, 48)
    assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.97


def test_mask_png_is_0_and_255(tmp_path: Path) -> None:
    mask = np.zeros((5, 7), bool)
    mask[1, 2] = True
    write_png(tmp_path / "m.png", mask)
    back = np.asarray(Image.open(tmp_path / "m.png"))
    assert back.shape == (5, 7) and set(np.unique(back)) == {0, 255} and back[1, 2] == 255
