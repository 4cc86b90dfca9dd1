"""What the values of labels, token weights and counts must be, and the one wording of it for every backend.

Each backend finds a wrong value where it looks at these tensors anyway (`ntpseg.losses.compaction` on the CPU, a kernel
and the one copy to the host on a GPU) and comes here to say which it was. Under ``LossOptions.max_rows`` nothing is
copied to the host: there a GPU has assertions on the device, with the messages below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ntpseg.losses.options import LossOptions
from ntpseg.utils.checks import brief
from ntpseg.utils.tensor_checks import shown

LABELS = "labels must be ignore_index or in the vocabulary and its vocab_range"
TOKEN_WEIGHTS = "token_weights must be finite and >= 0 where there is a label"
NUM_ITEMS = "num_items must be finite and >= 0"
MAX_ROWS = "max_rows must be at least the supervised rows of every head"


def check_labels(labels: Tensor, options: LossOptions, classes: int | None) -> None:
    """Raise a `ValueError` for the first label, in order of memory, that no class stands for; labels that are never
    predicted (position 0 with the shift) may be anything.

    Args:
        labels: ``[B, T]`` integer.
        options: reads ignore_index, shift and vocab_range.
        classes: V where there is no vocab_range; None: unknown.
    """
    low, high = options.vocab_range or (0, classes)
    seen = labels[:, int(options.shift) :]
    bad = seen < low if high is None else (seen < low) | (seen >= high)
    bad = bad & (seen != options.ignore_index)
    if bool(bad.any()):
        wanted = f">= {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"labels must be ignore_index or {wanted}, got {int(seen[bad][0])}")


def check_token_weights(token_weights: Tensor, labels: Tensor, options: LossOptions, work: torch.dtype) -> None:
    """Raise a `ValueError` for the first token weight that is negative or not finite and has a label to weigh.

    Args:
        token_weights: ``[B, T]`` float.
        labels: ``[B, T]`` integer.
        options: reads ignore_index and shift.
        work: the dtype in which they weigh, and must be finite.
    """
    step = int(options.shift)
    seen = token_weights.detach()[:, step:]
    bad = ~((seen >= 0) & (seen.to(work) < torch.inf)) & (labels[:, step:] != options.ignore_index)
    if bool(bad.any()):
        raise ValueError(f"{TOKEN_WEIGHTS}, got {float(seen[bad][0]):g}")


def check_counts(name: str, counts: Tensor) -> None:
    """Raise a `ValueError` unless all counts are finite and not negative."""
    if bool(bad_counts(counts)):
        raise ValueError(f"{name} must be finite and >= 0, got {brief_numbers(counts)}")


def bad_counts(counts: Tensor) -> Tensor:
    """0-dim bool: whether a count is negative or not finite."""
    return ~((counts >= 0) & (counts < torch.inf)).all()


def raise_first(
    labels: Tensor,
    token_weights: Tensor | None,
    counts: list[Any],
    options: LossOptions,
    classes: int,
    work: torch.dtype,
) -> None:
    """Say what a backend has found wrong, the labels first."""
    check_labels(labels, options, classes)
    if token_weights is not None:
        check_token_weights(token_weights, labels, options, work)
    for count in counts:
        if count is not None:
            check_counts("num_items", count)


def brief_numbers(value: Any) -> str:
    """Numbers of a tensor or a sequence for a message in one line."""
    if not isinstance(value, Tensor):
        return brief(value)
    return brief(value.tolist()) if value.numel() <= 16 and value.device.type != "meta" else shown(value)
