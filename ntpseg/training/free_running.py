"""Dice of decoded masks while training: the loss is low long before a model decodes anything but empty masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ntpseg.training.dataset import CodeSource

if TYPE_CHECKING:
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.tokenizers.vision import VisionTokenizer

CASES = 64


class FreeRunningDice:
    """Decodes validation cases greedily and compares them with the masks of their true tokens.

    The truth is what the true tokens decode to, so 1 can be reached: the loss of the tokenizer is not counted.

    Args:
        cache: the validation split's codes and sentences.
        sequence: the sequence format.
        vision: the vision tokenizer.
        cases: how many cases, spread evenly over the split.
    """

    def __init__(
        self, cache: CodeSource, sequence: SequenceFormat, vision: VisionTokenizer, cases: int = CASES
    ) -> None:
        total = len(cache.image_codes)
        self.sequence, self.vision = sequence, vision
        chosen = [i * total // min(cases, total) for i in range(min(cases, total))]
        self.prompts = [sequence.prompt(cache.text_ids(i), cache.image_codes[i, 0]) for i in chosen]
        self.truth = self._masks(np.stack([np.asarray(cache.mask_codes[i, 0]) for i in chosen]))

    def _masks(self, codes: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            decoded = self.vision.decode_mask(torch.from_numpy(codes.astype(np.int64)))
        return (decoded[:, 0] >= 0.5).cpu().numpy()

    def __call__(self, model: Any) -> dict[str, float]:
        """``{"token_dice": per-image mean Dice}`` of `model`, an `NTPSegModel`."""
        from ntpseg.evaluation.metrics import dice_scores
        from ntpseg.generation import generate_masks

        codes = generate_masks(model, self.prompts, sequence=self.sequence).codes
        return {"token_dice": float(dice_scores(self._masks(codes), self.truth).mean())}
