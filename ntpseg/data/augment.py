"""Random variants of a training pair: geometry for image and mask alike, brightness for the image alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from ntpseg.data.laterality import swap_laterality
from ntpseg.utils.checks import check_number

BLACK = -1.0
MAX_ATTEMPTS = 8


@dataclass(frozen=True)
class Augmentation:
    """How far a variant may be from its original; every amount is drawn for each variant.

    Attributes:
        flip: probability of a horizontal flip, which also swaps left and right in the sentence. Keep it 0 where a
            mirrored image is anatomically wrong (CT slices with heart, liver or spleen) or the text names sides in
            a way that `swap_laterality` does not know.
        rotate_degrees: largest angle either way.
        scale: largest enlargement or reduction: the factor lies between 1 / (1 + scale) and 1 + scale.
        translate: largest shift along each axis, as a fraction of the side.
        brightness: largest offset, as a fraction of the range from black to white.
        contrast: the factor around the image's mean lies between 1 / (1 + contrast) and 1 + contrast.
        gamma: the exponent lies between 1 / (1 + gamma) and 1 + gamma.
        noise: largest standard deviation of Gaussian noise, as a fraction of the range.

    Raises:
        ValueError: an amount is negative or no number, `flip` is above 1, `translate` 1 or more.
    """

    flip: float = 0.0
    rotate_degrees: float = 10.0
    scale: float = 0.1
    translate: float = 0.06
    brightness: float = 0.08
    contrast: float = 0.15
    gamma: float = 0.2
    noise: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), 0)
        check_number("flip", self.flip, 0, 1)
        check_number("translate", self.translate, 0, below=1)

    def apply(
        self, image: np.ndarray, mask: np.ndarray, text: str, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """One random variant; the arguments are left as they are.

        A mask that is not empty does not become empty: geometry that pushes all of it out of the image is drawn again.

        Args:
            image: float32 [C, S, S] in [-1, 1].
            mask: float32 [1, S, S] in {0, 1}.
            text: the sentence.
            rng: source of randomness; the same state gives the same variant.

        Returns:
            float32 [C, S, S] in [-1, 1], float32 [1, S, S] in {0, 1}, and the sentence that fits them. What lies
            outside the original is black and background.

        Raises:
            ValueError: they are no float arrays, or the shapes are not [C, S, S] and [1, S, S].
        """
        for name, array in (("image", image), ("mask", mask)):
            if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
                given = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise ValueError(f"{name} must be a float32 array, got {given}")
        if not image.ndim or not image.size:
            raise ValueError(f"image must be [C, S, S] with C, S >= 1, got {list(image.shape)}")
        side = image.shape[-1]
        if image.ndim != 3 or image.shape[1] != side or mask.shape != (1, side, side):
            shapes = f"{list(image.shape)} and {list(mask.shape)}"
            raise ValueError(f"image and mask must be [C, S, S] and [1, S, S], got {shapes}")
        if self.flip and rng.random() < self.flip:
            image, mask, text = image[:, :, ::-1], mask[:, :, ::-1], swap_laterality(text)
        if self.rotate_degrees or self.scale or self.translate:
            image, mask = self._transform(image, mask, rng)
        return self._adjust_intensity(image, rng), np.array(mask, dtype=np.float32, order="C"), text

    def _transform(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        nonempty = bool(mask.any())
        for _ in range(MAX_ATTEMPTS):
            matrix = self._matrix(image.shape[-1], rng)
            moved = _warp(mask[0], matrix, 0.0) >= 0.5
            if moved.any() or not nonempty:
                pixels = np.stack([_warp(channel, matrix, BLACK) for channel in image])
                return pixels, moved[None].astype(np.float32)
        return image, mask

    def _matrix(self, side: int, rng: np.random.Generator) -> tuple[float, float, float, float, float, float]:
        """Rows of the affine map from a variant's pixel to the original's, about the image's centre."""
        angle = math.radians(rng.uniform(-1, 1) * self.rotate_degrees)
        shrink = _factor(self.scale, rng)
        cosine, sine, centre = math.cos(angle) * shrink, math.sin(angle) * shrink, side / 2
        right, down = rng.uniform(-1, 1, 2) * self.translate * side
        return (
            cosine, sine, centre + right - cosine * centre - sine * centre,
            -sine, cosine, centre + down + sine * centre - cosine * centre,
        )  # fmt: skip

    def _adjust_intensity(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        pixels = (image + np.float32(1)) * np.float32(0.5)
        if self.gamma:
            pixels = np.clip(pixels, 0, 1) ** np.float32(_factor(self.gamma, rng))
        if self.contrast:
            mean = pixels.mean()
            pixels = (pixels - mean) * np.float32(_factor(self.contrast, rng)) + mean
        if self.brightness:
            pixels = pixels + np.float32(rng.uniform(-1, 1) * self.brightness)
        if self.noise:
            deviation = np.float32(rng.uniform(0, self.noise))
            pixels = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * deviation
        return np.ascontiguousarray(np.clip(pixels, 0, 1) * np.float32(2) - np.float32(1))


def _factor(amount: float, rng: np.random.Generator) -> float:
    """A factor between 1 / (1 + amount) and 1 + amount, as likely above 1 as below."""
    return (1 + amount) ** rng.uniform(-1, 1)


def _warp(plane: np.ndarray, matrix: tuple[float, ...], fill: float) -> np.ndarray:
    # Pillow's bilinear affine map takes half the time of scipy's at these sizes.
    picture = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    moved = picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)
    return np.asarray(moved)
