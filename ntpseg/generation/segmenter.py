"""`Segmenter`: an image and a sentence in, a mask at the image's own size out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ntpseg.data import prepare, read_image, resize_mask
from ntpseg.generation.generate import MaskGenerator
from ntpseg.generation.options import DecodingOptions, Generated
from ntpseg.tokenizers.text import encode_text

if TYPE_CHECKING:
    from ntpseg.models.bundle import Bundle

ENCODE_BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """One segmented image.

    Attributes:
        mask: bool ``[H, W]``, the image's own size.
        confidence: float32 ``[h, w]``, the probability of each patch's code among all mask codes.
        codes: int64 ``[h, w]``, the mask codes.
    """

    mask: np.ndarray
    confidence: np.ndarray
    codes: np.ndarray


class Segmenter:
    """Segments images with a trained model.

    Args:
        bundle: model, tokenizers and sequence format, see `ntpseg.models.Bundle`.
        options: see `DecodingOptions`.
    """

    def __init__(self, bundle: Bundle, options: DecodingOptions | None = None) -> None:
        self.bundle = bundle
        self.generator = MaskGenerator(bundle.model, bundle.sequence, options)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike[str],
        options: DecodingOptions | None = None,
        *,
        device: str | torch.device | None = None,
    ) -> Segmenter:
        """Load a run or its ``model/`` directory; on the GPU if there is one, unless `device` is given."""
        from ntpseg.models.bundle import Bundle

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(Bundle.from_pretrained(Path(directory), device=device), options)

    def segment(self, image: np.ndarray | str | PathLike[str], text: str) -> Prediction:
        """Segment what `text` refers to.

        Args:
            image: a file, or pixels uint8 ``[H, W]`` or ``[H, W, 3]``.
            text: the sentence; may be empty.

        Raises:
            ValueError: the image cannot be read or is not uint8.
        """
        return next(iter(self.segment_all([image], [text])))

    def segment_all(
        self,
        images: Sequence[np.ndarray | str | PathLike[str]],
        texts: Sequence[str],
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Prediction]:
        """Segment pair after pair of an image and its sentence; decoded together, yielded in order.

        Raises:
            ValueError: there are not as many texts as images, or an image cannot be read.
        """
        if len(images) != len(texts):
            raise ValueError(f"texts must have the length of images, {len(images)}, got {len(texts)}")
        sizes: list[tuple[int, int]] = []
        codes = self.encode(self._pixels(images, sizes))
        generated = self.decode(codes, texts, progress)
        for i, probability in enumerate(self.probabilities(generated.codes)):
            mask = resize_mask(probability, *sizes[i])
            yield Prediction(mask, generated.confidence[i], generated.codes[i])

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Image codes int64 ``[N, h, w]`` of images, uint8 ``[H, W]`` or ``[H, W, 3]`` of any size."""
        vision = self.bundle.vision
        codes: list[np.ndarray] = []
        batch: list[np.ndarray] = []

        def flush() -> None:
            codes.append(vision.encode_image(torch.from_numpy(np.stack(batch))).cpu().numpy())
            batch.clear()

        with torch.inference_mode():
            for image in images:
                batch.append(prepare(image, None, vision.image_size, vision.channels)[0])
                if len(batch) == ENCODE_BATCH:
                    flush()
            if batch:
                flush()
        return np.concatenate(codes)

    def decode(
        self, image_codes: np.ndarray, texts: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> Generated:
        """Mask codes of ``[N, h, w]`` image codes and N sentences."""
        ids = {text: encode_text(self.bundle.text, text) for text in dict.fromkeys(texts)}
        prompts = [
            self.bundle.sequence.prompt(ids[text], codes) for text, codes in zip(texts, image_codes, strict=True)
        ]
        return self.generator(prompts, progress)

    def probabilities(self, mask_codes: np.ndarray) -> Iterator[np.ndarray]:
        """The foreground probability, float32 ``[S, S]`` at the model's size, of each of ``[N, h, w]`` mask codes."""
        for first in range(0, len(mask_codes), ENCODE_BATCH):
            part = torch.from_numpy(np.ascontiguousarray(mask_codes[first : first + ENCODE_BATCH]))
            # Closed before anything is yielded: a generator suspended inside it would leave the caller without
            # gradients, permanently where two of them alternate.
            with torch.inference_mode():
                decoded = self.bundle.vision.decode_mask(part)[:, 0].float().cpu().numpy()
            yield from decoded

    @staticmethod
    def _pixels(
        images: Sequence[np.ndarray | str | PathLike[str]], sizes: list[tuple[int, int]]
    ) -> Iterator[np.ndarray]:
        for image in images:
            pixels = image if isinstance(image, np.ndarray) else read_image(image)
            sizes.append((pixels.shape[0], pixels.shape[1]))
            yield pixels
