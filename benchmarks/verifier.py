"""The accuracy that a provider of `loss` must show before it is timed: errors against float64, and their limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Provider, check_errors, relative_error
from benchmarks.operands import Operands
from benchmarks.oracle import Truth, truth

FULL = "CE + TCL + HET"
# Relative errors, in norm for the gradients, that no right computation in the dtype reaches; logits rounded to bf16
# reach 1.5e-2. Predictions may miss the greatest logit by a rounding of it.
LIMITS = {
    "float32": {"loss": 1e-5, "d_hidden": 1e-4, "d_weight": 1e-4, "prediction": 1e-5},
    "bfloat16": {"loss": 5e-3, "d_hidden": 4e-2, "d_weight": 4e-2, "prediction": 8e-3},
    "float16": {"loss": 1e-3, "d_hidden": 5e-3, "d_weight": 5e-3, "prediction": 1e-3},
}
OURS_OVER_EAGER = 2.0  # the package promises at most twice the error of PyTorch itself at the same dtype
# two roundings of the result: below, there is no "twice"
_ROUNDING = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4}

Step = Callable[[], dict[str, Tensor | None]]


class Verifier:
    """Errors of providers against float64, the truth computed once where predictions agree."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.known: list[tuple[bool, Truth]] = []
        self.eager: dict[str, float] | None = None

    def provider(
        self, setup: Callable[[], Step], computes: str, unavailable: str | None = None, *, filtered: bool = False
    ) -> Provider:
        """A provider whose check is `errors`."""
        return Provider(setup, lambda step: self.errors(step, computes, filtered=filtered), unavailable, computes)

    def errors(self, step: Any, computes: str, *, filtered: bool = False) -> dict[str, float]:
        """Relative errors.

        Args:
            step: one step of the provider.
            computes: `FULL`, or else cross-entropy alone.
            filtered: small gradients are left out on purpose, so twice the error of PyTorch is no measure.

        Raises:
            Inaccurate: one of them is above its limit, or no number.
        """
        fill_free_memory_with_nan(self.operands.weight.device)
        result = step()
        owned = hasattr(step, "rows_of")
        if owned:
            result = step.rows_of(result)
        expected = self.truth(computes == FULL, result["prediction"])
        errors = {
            "loss": float((result["loss"].double() - expected.loss).abs() / expected.loss.abs()),
            "d_hidden": relative_error(result["d_hidden"], expected.d_rows),
            "d_weight": relative_error(result["d_weight"], expected.d_weight),
        }
        if result["prediction"] is not None:
            errors["prediction"] = expected.gap
        dtype = self.operands.shape.dtype
        limits = dict(LIMITS[dtype])
        if owned and self.eager is not None and not filtered:
            for part in ("d_hidden", "d_weight"):
                limits[part] = min(limits[part], max(OURS_OVER_EAGER * self.eager[part], _ROUNDING[dtype]))
        if not owned and computes == FULL and self.eager is None:
            self.eager = errors
        return check_errors(errors, limits)

    def truth(self, terms: bool, prediction: Tensor | None) -> Truth:
        """The truth that goes with a provider's predictions."""
        for with_terms, known in self.known:
            if with_terms == terms and (prediction is None or torch.equal(known.prediction, prediction)):
                return known
        expected = truth(self.operands, terms=terms, prediction=prediction)
        # two at most: each holds the gradients in float64
        self.known[:] = [item for item in self.known if item[0] != terms] + [(terms, expected)]
        return expected


def fill_free_memory_with_nan(device: torch.device) -> None:
    """Fills memory that the next allocations will get with NaN, so that an output left unwritten shows."""
    size = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 64 << 20
    torch.full((size // 4,), float("nan"), device=device)
