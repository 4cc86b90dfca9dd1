"""Does the model read the sentence? Pairs every case with another image's text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def other_texts(texts: Sequence[str], seed: int = 0) -> list[str] | None:
    """Give every case the text of another case whose wording differs.

    Cases are sorted into blocks of equal text (blocks in an order drawn from `seed`) and the list is rotated by the
    size of the largest block, so every text is assigned exactly as often as it occurs. Where one text makes up more
    than half of the cases no such permutation exists; the cases that would meet their own text then take the next
    different one, in turn.

    Args:
        texts: the text of each case, length N.
        seed: picks one of the possible pairings; the result is the same on every run.

    Returns:
        N texts, each different from the one at its place, or None where all texts are the same.
    """
    names = list(dict.fromkeys(texts))
    if len(names) < 2:
        return None
    rng = np.random.default_rng(seed)
    rank = {names[i]: place for place, i in enumerate(rng.permutation(len(names)))}
    # A random order inside each block keeps neighbours in the data from being paired with neighbours.
    jitter = rng.permutation(len(texts))
    order = sorted(range(len(texts)), key=lambda i: (rank[texts[i]], jitter[i]))
    shift = max(Counter(texts).values())
    result = list(texts)
    for place, i in enumerate(order):
        result[i] = texts[order[(place + shift) % len(order)]]
    turn = 0
    for i, text in enumerate(texts):
        if result[i] == text:
            others = [name for name in names if name != text]
            result[i] = others[turn % len(others)]
            turn += 1
    return result
