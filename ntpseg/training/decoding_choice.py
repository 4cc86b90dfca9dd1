"""How a trained model decodes by default: passes, threshold, mirror, temperature; of validation and never of test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ntpseg.generation.options import DecodingOptions

if TYPE_CHECKING:
    from ntpseg.models.bundle import Bundle
    from ntpseg.tokenizers.pixel_cache import PixelSource

CASES = 512
PASSES = (0, 1, 2)
THRESHOLDS = tuple(round(0.3 + 0.05 * i, 2) for i in range(9))
# What one more pass over the mask has to add to the mean Dice to be worth its time.
GAIN_PER_PASS = 0.001
# Whether the mirror image is decoded too, passes, and threshold.
Candidate = tuple[bool, int, float]


@dataclass(frozen=True)
class DecodingChoice:
    """The choice and what it was made from.

    Attributes:
        options: fields of `DecodingOptions` that differ from their defaults.
        dice: mean Dice per image by (mirror, passes, threshold); empty where there was nothing to choose.
        cases: validation cases that were decoded.
        calibration: figures without and with the temperature, see `PixelCounts.measures`; None where none was fitted.
    """

    options: dict[str, Any]
    dice: dict[Candidate, float]
    cases: int
    calibration: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the options, and a list of the candidates."""
        tried = [
            {"mirror": mirror, "passes": passes, "threshold": threshold, "dice": round(dice, 5)}
            for (mirror, passes, threshold), dice in self.dice.items()
        ]
        found = {"options": self.options, "cases": self.cases, "tried": tried}
        return found if self.calibration is None else {**found, "calibration": self.calibration}


def choose_decoding(
    bundle: Bundle,
    validation: PixelSource,
    default: DecodingOptions,
    *,
    mirrored: bool = False,
    cases: int = CASES,
    progress: bool = True,
) -> DecodingChoice:
    """Decode validation cases with each number of refinement passes and take the best threshold of each.

    The score is the mean Dice per image at the model's size. The mean with the mirror image is tried with the passes
    that were best without it, and counts as so many passes again. The temperature of the probabilities is fitted last,
    by the likelihood of the same cases' pixels as they were chosen to be decoded; it changes no mask, so the threshold
    need not be chosen again. Another method has nothing to choose and is kept, without a temperature: ``ntpseg eval
    --split val --calibrate`` fits one.

    Args:
        bundle: the trained model.
        validation: its validation split.
        default: the method, and the options that are not chosen here.
        mirrored: whether the model was trained on mirrored images, so that it may read them.
        cases: at most so many, spread evenly over the split.
        progress: show a progress bar.
    """
    from ntpseg.evaluation.calibration import BAND, PixelCounts
    from ntpseg.evaluation.metrics import dice_scores
    from ntpseg.generation.segmenter import Segmenter
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
    scores: dict[Candidate, float] = {}
    counts: dict[tuple[bool, int], PixelCounts] = {}
    tries_mirror = mirrored and not default.mirror
    with progress_bar("choosing the decoding", count * (len(passes_tried) + tries_mirror), enabled=progress) as advance:

        def score(mirror: bool, passes: int) -> None:
            segmenter = Segmenter(bundle, replace(default, mirror=mirror, passes=passes))
            generated = segmenter.decode(segmenter.encode_prepared(pixels), texts, advance)
            probability = np.stack(list(segmenter.probabilities(generated)))
            counts[mirror, passes] = PixelCounts()
            counts[mirror, passes].add(probability, truth)
            for threshold in THRESHOLDS:
                scores[mirror, passes, threshold] = float(dice_scores(probability >= threshold, truth).mean())

        for passes in passes_tried:
            score(default.mirror, passes)
        if tries_mirror:
            score(True, _best(scores)[1])
    mirror, passes, threshold = _best(scores)
    of_best = counts[mirror, passes]
    temperature = of_best.fit_temperature()
    options = {"method": default.method, "passes": passes, "threshold": threshold}
    options |= {"mirror": True} if mirror else {}
    calibration = {
        "cases": count,
        "size": truth.shape[-1],
        "band": list(BAND),
        "uncalibrated": of_best.measures(),
        "calibrated": of_best.measures(temperature),
    }
    return DecodingChoice({**options, "calibration_temperature": temperature}, scores, count, calibration)


def _best(scores: dict[Candidate, float]) -> Candidate:
    """The best after the cost of its passes; ties go to fewer passes and to the threshold nearest to 0.5."""

    def worth(candidate: Candidate) -> tuple[float, float]:
        mirror, passes, threshold = candidate
        more = (passes + 1) * (2 if mirror else 1) - 1
        return round(scores[candidate] - GAIN_PER_PASS * more, 6), -abs(threshold - 0.5)

    return max(scores, key=worth)
