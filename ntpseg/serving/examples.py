"""Sentences that the page offers: those that the model was evaluated with, where its run has them."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

COUNT = 5
# Longer ones do not fit a line of the page.
LONGEST = 48


def example_sentences(model: Path) -> list[str]:
    """Up to `COUNT` different sentences of a run's evaluation, the most frequent ones; none of a packed model."""
    texts: Counter[str] = Counter()
    for table in sorted(model.glob("eval/*/cases.csv")) if model.is_dir() else []:
        with table.open(encoding="utf-8", newline="") as file:
            texts.update(" ".join((row.get("text") or "").split()) for row in csv.DictReader(file))
    chosen: dict[str, str] = {}
    for text, _ in texts.most_common():
        # "The liver." and "the liver" are one example.
        key = text.lower().strip(" .")
        if text and len(text) <= LONGEST and key not in chosen:
            chosen[key] = text
    return sorted(list(chosen.values())[:COUNT], key=len)
