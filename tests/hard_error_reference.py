"""The ranking and the recording of hard errors in plain Python: slow, and short enough to be read as the definition."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Entry = tuple[float, int, int]


def rank_value(value: float) -> float:
    return math.inf if math.isnan(value) else value


def topn_errors(deviation: Tensor, is_error: Tensor, n: int) -> tuple[Tensor, Tensor]:
    values, indices = [], []
    for row, errors in zip(deviation.float().tolist(), is_error.tolist()):
        result = sorted((-rank_value(v), i) for i, (v, e) in enumerate(zip(row, errors)) if e)[:n]
        values.append([-v for v, _ in result] + [-math.inf] * (n - len(result)))
        indices.append([i for _, i in result] + [-1] * (n - len(result)))
    shape = (deviation.shape[0], n)
    return torch.tensor(values).reshape(shape), torch.tensor(indices, dtype=torch.int32).reshape(shape)


def best(entries: Iterable[Entry], n: int) -> list[Entry]:
    """The n first of (deviation, position, token), a (position, token) pair once with its larger deviation."""
    largest: dict[tuple[int, int], float] = {}
    for value, position, token in entries:
        largest[position, token] = max(largest.get((position, token), -math.inf), rank_value(value))
    return sorted(((v, p, t) for (p, t), v in largest.items()), key=lambda e: (-e[0], e[1], e[2]))[:n]


def errors_of(prediction: Tensor, labels: Tensor, deviation: Tensor) -> list[list[Entry]]:
    return [
        [(v, i, p) for i, (p, y, v) in enumerate(zip(*row)) if p >= 0 and y != -100 and p != y]
        for row in zip(prediction.tolist(), labels.tolist(), deviation.float().tolist())
    ]
