"""The pictures of a report, as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ntpseg.generation.overlay import LEVELS as LEVELS
from ntpseg.generation.overlay import PREDICTION, draw, draw_levels
from ntpseg.generation.uncertainty import pixel_entropy

SIDE = 208
TOKEN_FRAMES = 4


@dataclass(frozen=True)
class Case:
    """One row of ``cases.csv`` with the files that belong to it.

    Attributes:
        row: the row, all strings.
        folder: the evaluation's directory.
        index: the row's number, which is also its place in ``probability.npy``.
        grey: show it in grey.
    """

    row: dict[str, str]
    folder: Path
    index: int
    grey: bool = False

    @property
    def dice(self) -> float:
        """Dice of the prediction."""
        return float(self.row["dice"])

    def image(self) -> np.ndarray:
        """Pixels, uint8 ``[H, W]`` or ``[H, W, 3]``."""
        from ntpseg.data import read_image

        pixels = read_image(self.row["image"])
        return greyscale(pixels) if self.grey else pixels

    def truth(self) -> np.ndarray:
        """The true mask, bool ``[H, W]``."""
        from ntpseg.data import read_mask

        return read_mask(self.row["mask"], self.row.get("mask_value", ""))

    def prediction(self, other: bool = False) -> np.ndarray:
        """The predicted mask, bool ``[H, W]``; with `other` the one for another image's text."""
        from ntpseg.data import read_mask

        return read_mask(self.folder / ("masks_other" if other else "masks") / f"{self.row['file']}.png")


def data_uri(pixels: np.ndarray) -> str:
    """A uint8 picture as JPEG in a ``data:`` URI, shrunk so that its longer side is at most `SIDE` pixels."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    if longest > SIDE:
        width, height = (max(1, round(n * SIDE / longest)) for n in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Full colour resolution, or the outlines smear; as PNG the page is three times larger.
    picture.save(buffer, format="JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def shrunk(image: np.ndarray, *masks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Image and masks at the report's size, so that outlines stay one pixel wide there."""
    from PIL import Image

    height, width = image.shape[:2]
    factor = SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    soft = [Image.fromarray(m.astype(np.float32)).resize(size, Image.Resampling.BILINEAR) for m in masks]
    return (small, *(np.asarray(m) >= 0.5 for m in soft))


def greyscale(image: np.ndarray) -> np.ndarray:
    """The luminance uint8 ``[H, W]`` of ``[H, W, 3]``; a grey image as it is."""
    from PIL import Image

    return image if image.ndim == 2 else np.asarray(Image.fromarray(image).convert("L"))


def probability_contours(image: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Lines of equal foreground probability (`LEVELS`) over the image.

    Args:
        image: uint8 ``[H, W]`` or ``[H, W, 3]``, at the report's size.
        probability: uint8 ``[S, S]``, times 255.

    Returns:
        uint8 ``[H, W, 3]``.
    """
    return draw_levels(greyscale(image), _enlarge(probability, image.shape) / 255)


def entropy_picture(image: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """The entropy of each pixel's probability over the image: the more of `PREDICTION`, the less sure.

    Args:
        image: uint8 ``[H, W]`` or ``[H, W, 3]``, at the report's size.
        probability: uint8 ``[S, S]``, times 255.

    Returns:
        uint8 ``[H, W, 3]``.
    """
    bits = pixel_entropy(_enlarge(probability, image.shape) / 255)[..., None]
    grey = np.repeat(greyscale(image)[..., None], 3, 2) * 0.6
    return np.rint(grey * (1 - bits) + np.asarray(PREDICTION) * bits).astype(np.uint8)


def token_frames(image: np.ndarray, probability: np.ndarray, grid: tuple[int, int], threshold: float) -> list[str]:
    """The mask as its tokens are read, row by row: pictures with a growing share of the cells, as data URIs.

    Args:
        image: uint8 ``[H, W]`` or ``[H, W, 3]``, at the report's size.
        probability: uint8 ``[S, S]``, times 255.
        grid: rows and columns of the mask tokens.
        threshold: of the mask, in [0, 1].
    """
    rows, columns = grid
    grey = greyscale(image)
    height, width = grey.shape
    mask = _enlarge(probability, image.shape) >= threshold * 255
    cell = (np.arange(height) * rows // height)[:, None] * columns + np.arange(width) * columns // width
    lines = np.zeros((height, width), bool)
    lines[[height * i // rows for i in range(1, rows)]] = True
    lines[:, [width * i // columns for i in range(1, columns)]] = True
    frames = []
    for frame in range(1, TOKEN_FRAMES + 1):
        written = cell < rows * columns * frame // TOKEN_FRAMES
        dimmed = np.where(written, grey, grey * 0.45).astype(np.uint8)
        picture = draw(dimmed, mask & written, PREDICTION)
        picture[lines] = (picture[lines] * 0.7 + 76.5).astype(np.uint8)
        frames.append(data_uri(picture))
    return frames


def _enlarge(probability: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(probability.astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture)
