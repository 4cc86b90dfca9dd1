"""Training pairs from the pixel cache, for front ends that read pixels: augmented anew in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ntpseg.tokenizers.text import encode_text
from ntpseg.training.dataset import Collator, EpochDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ntpseg.data import Augmentation
    from ntpseg.tokenizers.pixel_cache import PixelSource
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.tokenizers.vision import VisionTokenizer


class PixelDataset(EpochDataset):
    """Images, masks and sentences of a pixel cache or a packed data set.

    Args:
        cache: the pixels.
        augmentation: how samples vary between epochs; None: not at all (validation).
        seed: of the augmentation.
    """

    def __init__(self, cache: PixelSource, augmentation: Augmentation | None = None, *, seed: int = 0) -> None:
        super().__init__(seed)
        self.cache, self.augmentation = cache, augmentation

    def __len__(self) -> int:
        return len(self.cache)

    def prefetch(self, indices: Sequence[int]) -> None:
        self.cache.prefetch(indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask, text = self.cache.pair(index)
        if self.augmentation is not None:
            rng = np.random.default_rng((self.seed, self.epoch, index))
            image, mask, text = self.augmentation.apply(image, mask, text, rng)
        return {"sample_ids": index, "image": image, "mask": mask, "text": text}


class PixelCollator:
    """Tokenises a batch of a `PixelDataset`: text, masks and, where the sequence has image tokens, images.

    Masks are tokenised after their augmentation, so the same pair has other mask tokens in every epoch.

    Args:
        sequence: the sequence format.
        text: the text tokenizer.
        vision: the vision tokenizer.
        image_tokens: the sequence's image tokens are the image's codes; False fills them with code 0, the places of
            features that are not aligned.
        packing: see `Collator`.
    """

    def __init__(
        self,
        sequence: SequenceFormat,
        text: PreTrainedTokenizerBase,
        vision: VisionTokenizer,
        *,
        image_tokens: bool = True,
        packing: int | None = None,
    ) -> None:
        self.sequence, self.text, self.vision, self.image_tokens = sequence, text, vision, image_tokens
        self.collate = Collator(sequence, packing=packing)
        self._text_ids: dict[str, list[int]] = {}

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What `Collator` returns, with pixel_values ``[B, C, S, S]`` in [-1, 1] and mask_pixels ``[B, S, S]``."""
        images = torch.from_numpy(np.stack([sample["image"] for sample in samples]))
        masks = torch.from_numpy(np.stack([sample["mask"] for sample in samples]))
        mask_codes = self.vision.encode_mask(masks).cpu().numpy()
        image_codes: Any = [None] * len(samples)
        if self.sequence.image_grid is not None:
            image_codes = np.zeros((len(samples), *self.sequence.image_grid), np.int64)
            if self.image_tokens:
                image_codes = self.vision.encode_image(images).cpu().numpy()
        rows = []
        for sample, image, mask in zip(samples, image_codes, mask_codes):
            ids, labels = self.sequence.build(self._encode(sample["text"]), image, mask)
            rows.append({"sample_ids": sample["sample_ids"], "input_ids": ids, "labels": labels})
        return {**self.collate(rows), "pixel_values": images, "mask_pixels": masks[:, 0]}

    def _encode(self, text: str) -> list[int]:
        if text not in self._text_ids:
            self._text_ids[text] = encode_text(self.text, text)
        return self._text_ids[text]
