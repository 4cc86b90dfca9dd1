"""How a trained model decodes by default: passes and threshold chosen on the validation split, never on test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ntpseg.generation.options import DecodingOptions

if TYPE_CHECKING:
    from ntpseg.models.bundle import Bundle
    from ntpseg.tokenizers.pixel_cache import PixelCache

CASES = 512
PASSES = (0, 1, 2)
THRESHOLDS = tuple(round(0.3 + 0.05 * i, 2) for i in range(9))
# What one more pass over the mask has to add to the mean Dice to be worth its time.
GAIN_PER_PASS = 0.001


@dataclass(frozen=True)
class DecodingChoice:
    """The choice and what it was made from.

    Attributes:
        options: fields of `DecodingOptions` that differ from their defaults.
        dice: mean Dice per image by (passes, threshold); empty where there was nothing to choose.
        cases: validation cases that were decoded.
    """

    options: dict[str, Any]
    dice: dict[tuple[int, float], float]
    cases: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the options, and a list of the candidates."""
        tried = [{"passes": p, "threshold": t, "dice": round(d, 5)} for (p, t), d in self.dice.items()]
        return {"options": self.options, "cases": self.cases, "tried": tried}


def choose_decoding(
    bundle: Bundle, validation: PixelCache, default: DecodingOptions, *, cases: int = CASES, progress: bool = True
) -> DecodingChoice:
    """Decode validation cases with each number of refinement passes and take the best threshold of each.

    The score is the mean Dice per image at the model's size. A method without a read-out of expected patches has
    nothing to choose and is kept.

    Args:
        bundle: the trained model.
        validation: its validation split.
        default: the method, and the options that are not chosen here.
        cases: at most so many, spread evenly over the split.
        progress: show a progress bar.
    """
    from ntpseg.evaluation.metrics import dice_scores
    from ntpseg.generation.segmenter import EncodedImages, Segmenter
    from ntpseg.utils.progress import progress_bar

    if default.method != "refine":
        return DecodingChoice({"method": default.method}, {}, 0)
    count = min(cases, len(validation))
    chosen = [i * len(validation) // count for i in range(count)]
    pairs = [validation.pair(i) for i in chosen]
    pixels = np.stack([pair.image for pair in pairs])
    truth = np.stack([pair.mask[0] > 0 for pair in pairs])
    texts = [pair.text for pair in pairs]
    inputs = bundle.model.config.mask_inputs or {}
    # Without a share of replaced inputs the model has never read a draft.
    passes_tried: Sequence[int] = PASSES if inputs.get("replaced") and inputs.get("draft") else (0,)
    scores: dict[tuple[int, float], float] = {}
    with progress_bar("choosing the decoding", count * len(passes_tried), enabled=progress) as advance:
        for passes in passes_tried:
            segmenter = Segmenter(bundle, replace(default, passes=passes))
            codes = None if bundle.sequence.image_grid is None else segmenter.image_codes(pixels)
            generated = segmenter.decode(EncodedImages(codes, pixels), texts, advance)
            probability = np.stack(list(segmenter.probabilities(generated)))
            for threshold in THRESHOLDS:
                scores[passes, threshold] = float(dice_scores(probability >= threshold, truth).mean())
    # Ties go to fewer passes and to the threshold nearest to 0.5.
    best = max(scores, key=lambda key: (round(scores[key] - GAIN_PER_PASS * key[0], 6), -abs(key[1] - 0.5)))
    return DecodingChoice({"method": default.method, "passes": best[0], "threshold": best[1]}, scores, count)
