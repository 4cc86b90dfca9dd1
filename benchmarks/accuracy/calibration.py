"""Calibration of a run's probabilities by decoding, and what sampling several masks together saves.

python -m benchmarks.accuracy.calibration RUN DATA --out FILE

On the validation split. The temperature is fitted to one half of the subjects and judged on the other, so that no
figure is of the pixels that it was fitted to. The run is read and never written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.accuracy.common import split, true_mask, write
from ntpseg.data import Record, read_image, resize_mask
from ntpseg.evaluation.calibration import PixelCounts
from ntpseg.evaluation.metrics import dice_scores
from ntpseg.generation import DecodingOptions, Segmenter
from ntpseg.models import Bundle

SAMPLES = 8
ROUNDS = 3
FIGURES = ("ece", "brier", "nll")


def main() -> None:
    """Decode, fit, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="cases, spread evenly over the split")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bundle, records = Bundle.from_pretrained(arguments.run), split(arguments.data, "val")
    if arguments.limit < len(records):
        records = [records[i * len(records) // arguments.limit] for i in range(arguments.limit)]
    decodings = {
        "saved": DecodingOptions.of_bundle(bundle, dtype="float32", batch_size=32, calibration_temperature=1.0),
        "greedy, codes": DecodingOptions(dtype="float32", batch_size=32),
        "expected": DecodingOptions(method="expected", dtype="float32", batch_size=32),
        f"mean of {SAMPLES} samples": DecodingOptions(method="sample", samples=SAMPLES, dtype="float32", batch_size=32),
    }
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.accuracy.calibration {arguments.run.name} DATA --limit {arguments.limit}",
        "cases": len(records),
        "subjects": len({record.subject for record in records}),
        "saved": bundle.decoding,
        "decodings": {name: judged(Segmenter(bundle, options), records) for name, options in decodings.items()},
        "sampling_time": sampling_time(bundle, records[:4]),
    }
    write(arguments.out, result)


def judged(segmenter: Segmenter, records: list[Record]) -> dict[str, Any]:
    """Figures of the second half of the subjects at a temperature of 1 and at that of the first half."""
    halves = {subject: i % 2 for i, subject in enumerate(sorted({record.subject for record in records}))}
    counts, dice, entropy, agreement = (PixelCounts(), PixelCounts()), [], [], []
    images, texts = [read_image(record.image) for record in records], [record.text for record in records]
    for record, found in zip(records, segmenter.segment_all(images, texts), strict=True):
        truth = true_mask(record)
        counts[halves[record.subject]].add(found.probability, resize_mask(truth, *found.probability.shape))
        dice.append(dice_scores(found.mask[None], truth[None])[0])
        entropy.append(found.entropy.sum() / max((found.probability >= 0.5).sum(), 1))
        if found.sample_dice is not None:
            agreement.append(found.sample_dice)
    temperature = counts[0].fit_temperature()
    before, after = counts[1].measures(), counts[1].measures(temperature)
    row: dict[str, Any] = {"dice": float(np.mean(dice)), "temperature": temperature}
    for name, side in (("before", before), ("after", after)):
        row[name] = {key: round(side[key], 5) for key in FIGURES}
        row[name]["band"] = side["band"] and {key: round(side["band"][key], 5) for key in FIGURES}
    row["entropy_per_foreground_pixel_and_dice"] = round(float(spearmanr(entropy, dice).statistic), 3)
    if agreement:
        row["sample_dice"] = float(np.mean(agreement))
        row["sample_dice_and_dice"] = round(float(spearmanr(agreement, dice).statistic), 3)
    return row


def sampling_time(bundle: Bundle, records: list[Record]) -> dict[str, Any]:
    """Process time of all samples of one image in a batch over that of one after the other, interleaved."""
    made = {size: Segmenter(bundle, sampling(size)) for size in (SAMPLES, 1)}
    ratios, probabilities = [], []
    for record in records * ROUNDS:
        seconds = {}
        for size, segmenter in made.items():
            started = time.process_time()
            probabilities.append(segmenter.segment(record.image, record.text).probability)
            seconds[size] = time.process_time() - started
        ratios.append(seconds[SAMPLES] / seconds[1])
    apart = max(float(np.abs(a - b).max()) for a, b in zip(probabilities[::2], probabilities[1::2]))
    quarters = statistics.quantiles(ratios[len(records) :])
    return {
        "samples": SAMPLES,
        "batch_over_one_by_one": quarters[1],
        "quartiles": quarters[::2],
        "largest_difference": apart,
    }


def sampling(batch_size: int) -> DecodingOptions:
    """Options that decode at most `batch_size` samples together."""
    return DecodingOptions(method="sample", samples=SAMPLES, dtype="float32", batch_size=batch_size)


if __name__ == "__main__":
    main()
