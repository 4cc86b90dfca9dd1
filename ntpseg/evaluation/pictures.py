"""The pictures of a report, as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIDE = 208


@dataclass(frozen=True)
class Case:
    """One row of ``cases.csv`` with the files that belong to it.

    Attributes:
        row: the row, all strings.
        folder: the evaluation's directory.
        index: the row's number, which is also its place in ``confidence.npy``.
    """

    row: dict[str, str]
    folder: Path
    index: int

    @property
    def dice(self) -> float:
        """Dice of the prediction."""
        return float(self.row["dice"])

    def image(self) -> np.ndarray:
        """Pixels, uint8 ``[H, W]`` or ``[H, W, 3]``."""
        from ntpseg.data import read_image

        return read_image(self.row["image"])

    def truth(self) -> np.ndarray:
        """The true mask, bool ``[H, W]``."""
        from ntpseg.data import read_mask

        return read_mask(self.row["mask"])

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


def confidence_map(image: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Patch probabilities ``[h, w]`` in [0, 1] as colours over the image: uint8 ``[H, W, 3]``."""
    from matplotlib import colormaps
    from PIL import Image

    grey = image if image.ndim == 2 else np.asarray(Image.fromarray(image).convert("L"))
    colours = (colormaps["viridis"](confidence.astype(np.float32))[..., :3] * 255).astype(np.uint8)
    large = np.asarray(Image.fromarray(colours).resize(grey.shape[::-1], Image.Resampling.NEAREST))
    return (0.72 * large + 0.28 * grey[..., None]).astype(np.uint8)


def scale_bar() -> str:
    """The colour scale of `confidence_map` as a picture, 0 on the left, 1 on the right."""
    from matplotlib import colormaps

    line = (colormaps["viridis"](np.linspace(0, 1, 160))[:, :3] * 255).astype(np.uint8)
    return data_uri(np.repeat(line[None], 10, 0))
