"""The decoding methods. To add one, write its function in a module of its own and list it here.

This module imports neither PyTorch nor the implementations, so that the command line can list the methods.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntpseg.generation.decoder import DecodingMethodFunction


@dataclass(frozen=True)
class DecodingMethod:
    """One way of filling a mask.

    Attributes:
        name: as in `DecodingOptions.method` and ``--method``.
        describe: what it does, in a few words.
        function: the `DecodingMethodFunction` as "module:function".
        min_heads: heads that the model needs.
        needs_rewind: it takes tokens back, so its decoder must be a `RewindableDecoder`.
    """

    name: str
    describe: str
    function: str
    min_heads: int = 1
    needs_rewind: bool = False

    def load(self) -> DecodingMethodFunction:
        """Import the implementation."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


METHODS: dict[str, DecodingMethod] = {
    method.name: method
    for method in (
        DecodingMethod("greedy", "one token per step", "ntpseg.generation.greedy:greedy"),
        DecodingMethod(
            "speculative",
            "heads 1.. draft, head 0 verifies; the same result",
            "ntpseg.generation.speculative:speculative",
            min_heads=2,
            needs_rewind=True,
        ),
    )
}
