"""The text-only prior: predict the mean training mask of the same caption, without looking at the image.

A segmenter that reads image and sentence must beat this by a margin; where captions were derived from the masks it is
far from zero. The threshold on the mean mask is the one that does best on the validation split.

    python -m benchmarks.accuracy.text_prior DATA [--size 224] [--out result.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.accuracy.common import arrays, score, split, write
from ntpseg.evaluation.metrics import dice_scores

THRESHOLDS = np.arange(0.15, 0.651, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    train = split(args.data, "train")
    _, masks = arrays(train, args.size)
    everything = masks.mean(0, dtype=np.float32)
    members: dict[str, list[int]] = {}
    for i, record in enumerate(train):
        members.setdefault(record.text, []).append(i)
    prior = {text: masks[chosen].mean(0, dtype=np.float32) for text, chosen in members.items()}

    val = split(args.data, "val")
    _, truth = arrays(val, args.size)
    guess = np.stack([prior.get(r.text, everything) for r in val])
    curve = {round(float(t), 2): float(dice_scores(guess >= t, truth).mean()) for t in THRESHOLDS}
    threshold = max(curve, key=lambda t: curve[t])

    test = split(args.data, "test")
    result = {
        "baseline": "text prior",
        "size": args.size,
        "captions": len(prior),
        "unseen_captions": sum(r.text not in prior for r in test),
        "threshold": threshold,
        "val_dice_by_threshold": curve,
        # Moving the threshold to 0.5 lets the resize's own 0.5 cut there.
        "test": score(test, lambda i: (prior.get(test[i].text, everything) >= threshold).astype(np.float32)),
    }
    write(args.out, result)


if __name__ == "__main__":
    main()
