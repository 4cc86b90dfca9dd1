"""Reading and writing images of every pixel format in use, and bringing them to a model's size."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ntpseg.data.pixels import Stored, StrPath, medical_pixels, picture_pixels
from ntpseg.data.shards.paths import as_path
from ntpseg.utils.checks import check_choice, check_integer
from ntpseg.utils.files import atomic_write

if TYPE_CHECKING:
    from ntpseg.volumes.volume import Volume


@dataclass(frozen=True, slots=True)
class Window:
    """How an image of more than 8 bits was brought to 8 bits.

    Attributes:
        low, high: stored values that became 0 and 255; all below and above are clipped.
        minimum, maximum: of the finite pixels.
        nonfinite: number of NaN and infinite pixels; they became black.
    """

    low: float
    high: float
    minimum: float
    maximum: float
    nonfinite: int = 0

    @property
    def has_outliers(self) -> bool:
        """Whether pixels outside the window reach further than the window is wide, such as a burnt-out pixel."""
        return self.maximum - self.minimum > 2 * (self.high - self.low)

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


def read_image(path: StrPath) -> np.ndarray:
    """Read an image as uint8, upright (its EXIF orientation is applied).

    8-bit pixels are returned as stored; a palette is resolved; transparent pixels become black; grey pictures stored
    as colour become grey. Deeper pixels (16- or 32-bit, float) have no fixed meaning: the range between the
    `ntpseg.volumes.windows.PERCENTILES` of the image's own pixels is stretched to 0..255 (`read_windowed` tells it),
    unless integers fit into 0..255 already. NaN and infinite pixels become black.

    Args:
        path: PNG, TIFF, JPEG, BMP or another of `ntpseg.data.pixels.FORMATS`, of at most
            `ntpseg.data.pixels.MAX_PIXELS` pixels; or DICOM of one frame, or 2-D NIfTI, which are displayed by the
            window "auto" of `ntpseg.volumes.windows`.

    Returns:
        uint8 [H, W] if grey, [H, W, 3] (RGB) if coloured.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be decoded, is too large, or has several pages; the message names it.
    """
    return read_windowed(path)[0]


def read_windowed(path: StrPath) -> tuple[np.ndarray, Window | None]:
    """What `read_image` returns, and the window that was used; None for an image of 8 bits."""
    return read_oriented(path)[:2]


def read_oriented(path: StrPath) -> tuple[np.ndarray, Window | None, int]:
    """What `read_windowed` returns, and the EXIF orientation that was applied, 1 where there was none."""
    medical = medical_pixels(as_path(path))
    if medical is not None:
        return *_displayed(path, medical), 1
    stored = picture_pixels(as_path(path))
    return *_eight_bits(path, stored), stored.orientation


def _eight_bits(path: StrPath, stored: Stored) -> tuple[np.ndarray, Window | None]:
    pixels = stored.pixels if stored.palette is None else stored.palette[stored.pixels]
    if stored.alpha is not None:
        opacity = stored.alpha.astype(np.uint16)
        opacity = opacity if pixels.ndim == 2 else opacity[..., None]
        pixels = ((pixels * opacity + 127) // 255).astype(np.uint8)
    if pixels.ndim == 3:
        grey = (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
        return np.ascontiguousarray(pixels[..., 0]) if grey else pixels, None
    if pixels.dtype == np.uint8:
        return pixels, None
    return _to_eight_bits(path, pixels)


def _displayed(path: StrPath, volume: Volume) -> tuple[np.ndarray, Window | None]:
    """A DICOM or NIfTI image by the window "auto"."""
    from ntpseg.volumes.windows import render

    if volume.voxels.dtype.kind == "f" and not np.isfinite(volume.voxels).any():
        raise ValueError(f"{path} must have finite pixels, got NaN or infinity in all of them")
    rendered = render(volume, "auto")
    pixels = rendered.apply(volume.voxels[0])
    if not rendered.limits:
        return pixels, None
    finite = volume.voxels[np.isfinite(volume.voxels)]
    low, high = rendered.limits[0]
    nonfinite = int(volume.voxels.size - finite.size)
    return pixels, Window(low, high, float(finite.min()), float(finite.max()), nonfinite)


def _to_eight_bits(path: StrPath, pixels: np.ndarray) -> tuple[np.ndarray, Window | None]:
    from ntpseg.volumes.windows import PERCENTILES

    values = pixels.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(f"{path} must have finite pixels, got NaN or infinity in all of them")
    inside = values[finite]
    minimum, maximum = float(inside.min()), float(inside.max())
    if minimum >= 0 and maximum <= 255 and np.issubdtype(pixels.dtype, np.integer):
        return values.astype(np.uint8), None
    # Values that occur, so that a small picture loses none of its range.
    low = float(np.percentile(inside, PERCENTILES[0], method="lower"))
    high = float(np.percentile(inside, PERCENTILES[1], method="higher"))
    if low == high:
        # Nearly all pixels are equal: what differs is the picture.
        low, high = minimum, maximum
    window = Window(low, high, minimum, maximum, int(values.size - inside.size))
    if low == high:
        return np.zeros(values.shape, np.uint8), window
    # Halves, because the difference of two finite numbers may be infinite.
    scaled = (np.where(finite, values, low).clip(low, high) / 2 - low / 2) / (high / 2 - low / 2)
    return np.rint(scaled * 255).astype(np.uint8), window


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
    return resize_probability(mask, height, width) >= threshold


def resize_probability(probability: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a mask (bool or a probability, [H, W]) to float32 [height, width], the mean of what a pixel covers."""
    soft = Image.fromarray(probability.astype(np.float32))
    enlarging = height > probability.shape[0] or width > probability.shape[1]
    resample = Image.Resampling.BILINEAR if enlarging else Image.Resampling.BOX
    return np.asarray(soft.resize((width, height), resample))


def encode_png(image: np.ndarray, software: str = "") -> bytes:
    """The PNG file of a uint8 or bool array ``[H, W]`` or ``[H, W, 3]``; a bool mask becomes 0 and 255.

    Args:
        image: the pixels.
        software: what the file says that it was written by; "": nothing.
    """
    pixels = image.astype(np.uint8) * 255 if image.dtype == bool else image
    buffer = io.BytesIO()
    about = PngInfo()
    if software:
        about.add_text("Software", software)
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=about)
    return buffer.getvalue()


def write_png(path: Path, image: np.ndarray, software: str = "") -> None:
    """Write what `encode_png` gives; the file appears complete or not at all."""
    atomic_write(path, encode_png(image, software))
