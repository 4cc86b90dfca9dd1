"""Reading and writing images and masks of every pixel format in use, and bringing them to a model's size."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from ntpseg.utils.checks import check_choice, check_integer
from ntpseg.utils.files import atomic_write

StrPath = str | PathLike[str]

# Masks whose largest value is at most this are label maps: every label is foreground. Above it they are grey
# pictures of a mask (0/255, 0/65535, perhaps with JPEG noise): foreground is half of the largest value and more.
LARGEST_LABEL = 15


def _open(path: StrPath) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... on broken files
        raise ValueError(f"{path} must be a readable image file, got: {error}") from error
    return image


def _pixels(path: StrPath) -> np.ndarray:
    """The first frame's pixels as stored: [H, W] of any dtype, or uint8 [H, W, 3]; transparency is black."""
    image = _open(path)
    if image.mode in ("L", "RGB", "F", "I") or image.mode.startswith("I;16"):
        return np.array(image)
    if image.mode == "1":
        return np.array(image.convert("L"))
    if image.mode == "P" and "transparency" not in image.info:
        return np.array(image.convert("RGB"))
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa"):
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    return np.array(image.convert("RGB"))


def read_image(path: StrPath) -> np.ndarray:
    """Read an image as uint8.

    8-bit pixels are returned as stored; a palette is resolved; transparent pixels become black; grey pictures stored
    as colour become grey. Deeper pixels (16- or 32-bit, float) have no fixed meaning: the image's own minimum
    and maximum are stretched to 0..255, unless they fit into 0..255 already.

    Args:
        path: PNG, TIFF, JPEG, BMP or any other format that Pillow reads; the first frame counts.

    Returns:
        uint8 [H, W] if grey, [H, W, 3] (RGB) if coloured.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be decoded; the message names it.
    """
    pixels = _pixels(path)
    if pixels.ndim == 3:
        grey = (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
        return np.ascontiguousarray(pixels[..., 0]) if grey else pixels
    if pixels.dtype == np.uint8:
        return pixels
    values = np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 255 and np.issubdtype(pixels.dtype, np.integer):
        return values.astype(np.uint8)
    if high == low:
        return np.zeros(values.shape, np.uint8)
    return np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8)


def read_mask(path: StrPath) -> np.ndarray:
    """Read a mask as bool [H, W].

    Colour counts by its brightest channel, transparent pixels are background. If the largest value is at most
    15 the file is a label map and every non-zero pixel is foreground (0/1 masks); otherwise foreground is what reaches
    half of the largest value (0/255 and 0/65535 masks, also with JPEG noise).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be decoded; the message names it.
    """
    pixels = _pixels(path)
    values = pixels.max(axis=2) if pixels.ndim == 3 else pixels
    values = np.nan_to_num(values.astype(np.float64), nan=0.0)
    largest = values.max(initial=0.0)
    if largest <= LARGEST_LABEL:
        return values > 0
    return values * 2 >= largest


def prepare(
    image: np.ndarray, mask: np.ndarray | None, size: int, channels: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Bring an image and its mask to a model's square input.

    The whole image is resized to `size` x `size` (its aspect ratio is not kept: a prediction is resized back to the
    image's own size). Pixels are averaged when shrinking; a mask pixel is foreground where at least half of it is.

    Args:
        image: uint8 [H, W] or [H, W, 3], as `read_image` gives.
        mask: bool [H, W] as `read_mask` gives, or None.
        size: S, pixels of a side.
        channels: 1 (colour is turned to luminance) or 3 (grey is repeated).

    Returns:
        float32 [channels, S, S] in [-1, 1], and float32 [1, S, S] in {0, 1} or None.

    Raises:
        ValueError: `size` is not positive, `channels` is not 1 or 3, or the shapes do not match.
    """
    check_integer("size", size, 1)
    check_choice("channels", channels, (1, 3))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"image must be uint8 [H, W] or [H, W, 3], got {image.dtype} {list(image.shape)}")
    if mask is not None and mask.shape != image.shape[:2]:
        raise ValueError(f"mask must have the image's size {list(image.shape[:2])}, got {list(mask.shape)}")
    picture = Image.fromarray(image).convert("L" if channels == 1 else "RGB")
    picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.float32).reshape(size, size, channels).transpose(2, 0, 1)
    scaled = np.ascontiguousarray(pixels) / np.float32(127.5) - np.float32(1)
    return scaled, None if mask is None else resize_mask(mask, size, size)[None].astype(np.float32)


def resize_mask(mask: np.ndarray, height: int, width: int, *, threshold: float = 0.5) -> np.ndarray:
    """Resize a mask (bool or a probability, [H, W]) to bool [height, width].

    Foreground is where the mean reaches `threshold`.
    """
    soft = Image.fromarray(mask.astype(np.float32))
    enlarging = height > mask.shape[0] or width > mask.shape[1]
    resample = Image.Resampling.BILINEAR if enlarging else Image.Resampling.BOX
    return np.asarray(soft.resize((width, height), resample)) >= threshold


def encode_png(image: np.ndarray) -> bytes:
    """The PNG file of a uint8 or bool array ``[H, W]`` or ``[H, W, 3]``; a bool mask becomes 0 and 255."""
    pixels = image.astype(np.uint8) * 255 if image.dtype == bool else image
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: Path, image: np.ndarray) -> None:
    """Write what `encode_png` gives; the file appears complete or not at all."""
    atomic_write(path, encode_png(image))
