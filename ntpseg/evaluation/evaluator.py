"""`evaluate`: decodes and scores a model's masks on the records of one split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ntpseg.data import read_truth, read_windowed, resize_mask
from ntpseg.data.records import check_masks
from ntpseg.data.spacing import pixel_mm
from ntpseg.evaluation.calibration import BAND, PixelCounts
from ntpseg.evaluation.groups import group_cases
from ntpseg.evaluation.metrics import COUNTS, EMPTY_MASKS, concatenate, dice_scores, mm_metrics, segmentation_metrics
from ntpseg.evaluation.result import Evaluation
from ntpseg.evaluation.summary import Bootstrap, summarise, summarise_findings, summarise_groups
from ntpseg.evaluation.text_check import other_texts
from ntpseg.evaluation.volumes import score_volumes, summarise_volumes
from ntpseg.generation.calibration import calibrate
from ntpseg.generation.segmenter import ENCODE_BATCH
from ntpseg.generation.uncertainty import pairwise_dice, pixel_entropy
from ntpseg.utils.checks import check_bool, check_integer
from ntpseg.utils.progress import StageCallback, counter

if TYPE_CHECKING:
    from ntpseg.data import Record
    from ntpseg.data.images import Window
    from ntpseg.generation import Generated, Segmenter
    from ntpseg.generation.segmenter import EncodedImages


@dataclass(frozen=True)
class EvaluationOptions:
    """What an evaluation does besides scoring.

    Attributes:
        text_check: number of cases that are also decoded with an empty text and with another image's text, spread
            evenly over the split; 0 leaves the check out.
        bootstrap: how intervals are computed.
        calibrate: fit the calibration temperature to these cases, which must then be the validation split, and use it
            in place of the segmenter's for what is reported and returned. Masks do not change.

    Raises:
        ValueError: `text_check` is negative.
    """

    text_check: int = 256
    calibrate: bool = False
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __post_init__(self) -> None:
        check_integer("text_check", self.text_check, 0)
        check_bool("calibrate", self.calibrate)


def evaluate(
    segmenter: Segmenter,
    records: Sequence[Record],
    options: EvaluationOptions | None = None,
    *,
    progress: StageCallback | None = None,
) -> Evaluation:
    """Decode every record's mask and score it at the image's own size.

    Args:
        segmenter: the model.
        records: cases with masks.
        options: see `EvaluationOptions`.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        ValueError: there is no record, or one has no mask or one of another size than its image.
    """
    options = options or EvaluationOptions()
    check_masks(records)
    return _Evaluator(segmenter, list(records), options, progress or (lambda stage, done, total: None)).run()


class _Evaluator:
    """One call of `evaluate`."""

    def __init__(
        self,
        segmenter: Segmenter,
        cases: list[Record],
        options: EvaluationOptions,
        progress: StageCallback,
    ) -> None:
        self.segmenter, self.cases, self.options, self.progress = segmenter, cases, options, progress
        self.texts, self.subjects = [r.text for r in cases], [r.subject for r in cases]
        self.pixel_mm: list[tuple[float, float] | None] = []

    def run(self) -> Evaluation:
        def images() -> Any:
            for i, record in enumerate(self.cases):
                self.progress("reading", i + 1, len(self.cases))
                (pixels, window), mask = read_windowed(record.image), read_truth(record)
                if mask.shape != pixels.shape[:2]:
                    raise ValueError(
                        f"masks must have their image's size, {list(pixels.shape[:2])}, got {list(mask.shape)} in "
                        f"{record.mask} of case {record.case!r}"
                    )
                if record.place is not None and record.place.volume:
                    first = shapes.setdefault(record.place.volume, mask.shape)
                    if first != mask.shape:
                        raise ValueError(
                            f"slices of volume {record.place.volume!r} must have one size, got {list(first)} and "
                            f"{list(mask.shape)} in case {record.case!r}"
                        )
                self.truth.append(mask)
                self.windows.append(window)
                self.pixel_mm.append(pixel_mm(record, (mask.shape[0], mask.shape[1])))
                yield pixels

        shapes: dict[str, tuple[int, ...]] = {}
        self.truth: list[np.ndarray] = []
        self.windows: list[Window | None] = []
        encoded = self.segmenter.encode(images())
        generated = self._decode("decoding", encoded, self.texts)
        masks, counts = self._masks_and_counts(generated)
        parts = []
        for i, (mask, truth) in enumerate(zip(masks, self.truth, strict=True)):
            parts.append(segmentation_metrics(mask[None], truth[None], self.pixel_mm[i]))
            self.progress("scoring", i + 1, len(masks))
        per_case = concatenate(_with_unknown(parts))
        per_case["confidence"] = generated.confidence.mean(axis=(1, 2)).astype(np.float64)
        per_case["ceiling"] = self._ceiling()
        bootstrap = self.options.bootstrap
        summary = summarise(per_case, self.subjects, bootstrap)
        sizes = np.array([truth.size for truth in self.truth], np.int64)
        summary["findings"] = summarise_findings(per_case, sizes, self.subjects, bootstrap)
        summary["empty_masks"] = EMPTY_MASKS
        summary["ceiling"] = float(per_case["ceiling"].mean())
        generator = self.segmenter.generator
        summary["decoding"] = {
            "method": generator.options.method,
            "passes": generator.options.passes if generator.options.method == "refine" else None,
            "samples": generator.options.samples if generator.options.method == "sample" else None,
            "threshold": generator.options.threshold,
            "mirror": generator.options.mirror,
            "path": type(generator.decoder).__name__,
            "dtype": str(generator.decoder.dtype).removeprefix("torch."),
            "tokens_per_second": generated.tokens_per_second,
            "tokens": generated.codes.size,
            "seconds": generated.seconds,
            "steps": generated.steps,
        }
        options = self.segmenter.options
        temperature = counts.fit_temperature() if self.options.calibrate else options.calibration_temperature
        summary["decoding"]["calibration_temperature"] = temperature
        calibrated = counts.measures(temperature)
        size = self.segmenter.bundle.vision.image_size
        before = calibrated if temperature == 1 else counts.measures()
        summary["calibration"] = {"size": size, "band": list(BAND), "uncalibrated": before, "calibrated": calibrated}
        maps, entropy = [], []
        for found in self.segmenter.probabilities(generated):
            likely = calibrate(found, temperature)
            entropy.append(pixel_entropy(likely).mean())
            maps.append(np.rint(likely * 255).astype(np.uint8))
        per_case["entropy"] = np.array(entropy, np.float64)
        if generated.samples is not None and generated.samples.shape[1] > 1:
            per_case["sample_dice"] = np.array(list(map(self._agreement, generated.samples)))
            summary["sample_dice"] = float(per_case["sample_dice"].mean())
        result = Evaluation(self.cases, per_case, summary, masks, generated.confidence, np.stack(maps))
        result.windows = self.windows
        if self.options.text_check:
            self._text_check(encoded, result)
        summary["grouped_by"], groups = group_cases(self.cases)
        summary["groups"] = summarise_groups(per_case, self.subjects, groups, bootstrap)
        modalities = [r.place.modality if r.place else "" for r in self.cases]
        if len(set(modalities)) > 1:
            summary["modalities"] = summarise_groups(per_case, self.subjects, modalities, bootstrap)
        result.volumes = score_volumes(self.cases, masks, self.truth, self.progress)
        if result.volumes:
            summary["volumes"] = summarise_volumes(result.volumes, bootstrap)
        return result

    def _decode(self, stage: str, images: EncodedImages, texts: Sequence[str]) -> Generated:
        return self.segmenter.decode(images, texts, counter(self.progress, stage, len(texts)))

    def _masks(self, generated: Generated, chosen: Sequence[int]) -> list[np.ndarray]:
        """Decoded masks at the size of the chosen images."""
        threshold = self.segmenter.options.threshold
        pairs = zip(self.segmenter.probabilities(generated), chosen, strict=True)
        return [resize_mask(p, *self.truth[i].shape[:2], threshold=threshold) for p, i in pairs]

    def _masks_and_counts(self, generated: Generated) -> tuple[list[np.ndarray], PixelCounts]:
        """The masks at the images' own sizes, and every pixel against the truth at the model's."""
        threshold, masks, counts = self.segmenter.options.threshold, [], PixelCounts()
        for probability, truth in zip(self.segmenter.probabilities(generated), self.truth, strict=True):
            masks.append(resize_mask(probability, *truth.shape[:2], threshold=threshold))
            counts.add(probability, resize_mask(truth, *probability.shape))
        return masks, counts

    def _agreement(self, samples: np.ndarray) -> float:
        return pairwise_dice(np.stack(list(self.segmenter.decode_codes(samples))) >= 0.5)

    def _ceiling(self) -> np.ndarray:
        vision = self.segmenter.bundle.vision
        size, codes = vision.image_size, []
        for first in range(0, len(self.truth), ENCODE_BATCH):
            part = self.truth[first : first + ENCODE_BATCH]
            small = np.stack([resize_mask(t, size, size) for t in part])[:, None].astype(np.float32)
            codes.append(vision.encode_mask(torch.from_numpy(small)).cpu().numpy())
        pairs = zip(self.segmenter.decode_codes(np.concatenate(codes)), self.truth, strict=True)
        return self._dice([resize_mask(p, *truth.shape) for p, truth in pairs], range(len(self.truth)))

    def _dice(self, masks: Sequence[np.ndarray], chosen: Sequence[int]) -> np.ndarray:
        return np.array([dice_scores(m[None], self.truth[i][None])[0] for m, i in zip(masks, chosen, strict=True)])

    def _text_check(self, images: EncodedImages, result: Evaluation) -> None:
        """Decode some cases again without their text and with another's; all are scored against the right truth."""
        count = min(self.options.text_check, len(self.cases))
        chosen = np.unique(np.linspace(0, len(self.cases) - 1, count).round().astype(int)).tolist()
        subjects = [self.subjects[i] for i in chosen]

        def estimate(dice: np.ndarray) -> dict[str, Any]:
            zeros = np.zeros(len(dice))
            cases = {"dice": dice, **{name: zeros for name in COUNTS}}
            return summarise(cases, subjects, self.options.bootstrap)["per_image"]["dice"]

        result.checked = chosen
        right = result.per_case["dice"][chosen]
        images = images.take(chosen)
        empty = self._decode("decoding, empty text", images, [""] * len(chosen))
        result.empty_dice = self._dice(self._masks(empty, chosen), chosen)
        check = {"cases": len(chosen), "right": estimate(right), "empty": estimate(result.empty_dice), "other": None}
        others = other_texts([self.texts[i] for i in chosen])
        if others is not None:
            generated = self._decode("decoding, another text", images, others)
            result.other_text, result.other_masks = others, self._masks(generated, chosen)
            result.other_dice = self._dice(result.other_masks, chosen)
            check["other"] = estimate(result.other_dice)
        result.summary["text_check"] = check


def _with_unknown(parts: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """`parts` with NaN for the scores in millimetres of cases whose millimetres are unknown, unless all are."""
    names = [name for name in mm_metrics() if any(name in part for part in parts)]
    return [{**part, **{n: part.get(n, np.full(1, np.nan)) for n in names}} for part in parts]
