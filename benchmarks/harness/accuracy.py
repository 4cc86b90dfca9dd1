"""Errors of a result against the truth, and the limits above which a provider gets no time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Inaccurate(Exception):
    """Raised by a provider's check: its result is wrong. The errors and the reason are its arguments."""


def check_errors(errors: dict[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """Returns the errors if all are within their limits.

    Raises:
        Inaccurate: one of them is above its limit, or no number.
    """
    for part, error in errors.items():
        if not error <= limits[part]:
            raise Inaccurate(errors, f"{part} must be within {limits[part]:.2g}, got an error of {error:.2g}")
    return errors


def relative_error(result: Tensor | None, expected: Tensor) -> float:
    """``|result - expected| / |expected|`` in norm; infinite where there is nothing or a NaN."""
    if result is None:
        return float("inf")
    return float(torch.linalg.vector_norm(result.double() - expected) / torch.linalg.vector_norm(expected.double()))
