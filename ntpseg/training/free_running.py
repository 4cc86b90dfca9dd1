"""Dice of decoded masks while training: the loss is low long before a model decodes anything but empty masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ntpseg.generation.options import DecodingOptions
from ntpseg.tokenizers.pixel_cache import PixelSource
from ntpseg.tokenizers.text import encode_text
from ntpseg.training.dataset import CodeSource

if TYPE_CHECKING:
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.tokenizers.vision import VisionTokenizer
    from ntpseg.training.preparation import Prepared

CASES = 64


class FreeRunningDice:
    """Decodes validation cases and compares them with the masks of their true tokens.

    The truth is what the true tokens decode to, so 1 can be reached: the loss of the tokenizer is not counted.

    Args:
        prompts: int64 ``[P]`` each.
        truth: int64 ``[N, h, w]``, the true mask codes.
        sequence: the sequence format.
        vision: the vision tokenizer.
        pixels: float32 ``[N, C, S, S]``, the images, for models with a stem.
        options: how masks are decoded; greedily by default.
    """

    def __init__(
        self,
        prompts: list[np.ndarray],
        truth: np.ndarray,
        sequence: SequenceFormat,
        vision: VisionTokenizer,
        pixels: np.ndarray | None = None,
        options: DecodingOptions | None = None,
    ) -> None:
        self.prompts, self.sequence, self.vision, self.pixels = prompts, sequence, vision, pixels
        self.options = options or DecodingOptions()
        self.truth = self._masks(truth)

    @classmethod
    def from_tokens(
        cls,
        cache: CodeSource,
        sequence: SequenceFormat,
        vision: VisionTokenizer,
        cases: int = CASES,
        options: DecodingOptions | None = None,
    ) -> FreeRunningDice:
        """For `cases` records of a token cache, spread evenly over it."""
        chosen = _spread(len(cache.image_codes), cases)
        prompts = [sequence.prompt(cache.text_ids(i), cache.image_codes[i, 0]) for i in chosen]
        truth = np.stack([np.asarray(cache.mask_codes[i, 0]) for i in chosen])
        return cls(prompts, truth, sequence, vision, options=options)

    @classmethod
    def from_prepared(
        cls, prepared: Prepared, options: DecodingOptions, cases: int = CASES, *, image_tokens: bool = True
    ) -> FreeRunningDice | None:
        """For `cases` records of a prepared run's validation split; None where there is none.

        `image_tokens` says what an image's places in the prompt hold, see `PixelCollator`.
        """
        cache, sequence, vision = prepared.validation, prepared.sequence, prepared.vision
        if cache is None:
            return None
        if not isinstance(cache, PixelSource):
            return cls.from_tokens(cache, sequence, vision, cases, options)
        pairs = [cache.pair(i) for i in _spread(len(cache), cases)]
        pixels = np.stack([pair.image for pair in pairs])
        codes: Any = [None] * len(pairs)
        if sequence.image_grid is not None:
            codes = np.zeros((len(pairs), *sequence.image_grid), np.int64)
            if image_tokens:
                codes = vision.encode_image(torch.from_numpy(pixels)).cpu().numpy()
        prompts = [sequence.prompt(encode_text(prepared.text, pair.text), code) for pair, code in zip(pairs, codes)]
        truth = vision.encode_mask(torch.from_numpy(np.stack([pair.mask for pair in pairs]))).cpu().numpy()
        return cls(prompts, truth, sequence, vision, pixels, options)

    def _masks(self, codes: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            decoded = self.vision.decode_mask(torch.from_numpy(codes.astype(np.int64)))
        return (decoded[:, 0] >= 0.5).cpu().numpy()

    def __call__(self, model: Any) -> dict[str, float]:
        """``{"token_dice": per-image mean Dice}`` of `model`, an `NTPSegModel`."""
        from ntpseg.evaluation.metrics import dice_scores
        from ntpseg.generation import generate_masks

        generated = generate_masks(
            model, self.prompts, sequence=self.sequence, options=self.options, pixel_values=self.pixels
        )
        if generated.probability is None:
            masks = self._masks(generated.codes)
        else:
            masks = generated.probability >= self.options.threshold
        return {"token_dice": float(dice_scores(masks, self.truth).mean())}


def _spread(total: int, cases: int) -> list[int]:
    cases = min(cases, total)
    return [i * total // cases for i in range(cases)]
