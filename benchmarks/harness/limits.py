"""What a provider of ours promises to stay within, and whether a run shows that it does."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Promises of one provider.

    Attributes:
        provider: its name.
        ratios: by the name of another provider, the largest median over rounds of the ratio to it.
        extra_bytes: most memory at the peak of a step beyond the step's own results; None: no such promise.
        result_bytes: what those results take (gradients).
    """

    provider: str
    ratios: Mapping[str, float] = field(default_factory=dict)
    extra_bytes: float | None = None
    result_bytes: float = 0.0

    def check(self, seconds: Mapping[str, Sequence[float]], memory: Mapping[str, Any] | None) -> dict[str, Any]:
        """What was measured of each promise, its limit and whether it is met.

        Args:
            seconds: of every timed provider, round by round.
            memory: the provider's peak, as `harness.memory.peak_memory` returns it.
        """
        result: dict[str, Any] = {}
        for other, limit in self.ratios.items():
            if other not in seconds:
                continue
            ratios = [a / b for a, b in zip(seconds[self.provider], seconds[other], strict=True)]
            measured = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            result[other] = {"ratio": measured, "limit": limit, "met": measured["median"] <= limit}
        if self.extra_bytes is not None and memory is not None:
            extra = memory["delta"] - self.result_bytes
            result["extra bytes"] = {"bytes": extra, "limit": self.extra_bytes, "met": extra <= self.extra_bytes}
        return result
