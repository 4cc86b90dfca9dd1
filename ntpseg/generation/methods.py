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
        needs_readout: it works on expected patches, so the model must have a read-out (``patch_size``).
        reads_expected: with the read-out "auto" masks are the expected patches, where the model has a read-out.
        needs_blanks: it reads blanks, so the model must have been trained to (``mask_inputs`` with ``blank`` above 0).
        streams: it is a `StreamingMethodFunction`. Of other methods a mask's tokens are told once all are there.
        options: fields of `DecodingOptions` that it alone reads.
    """

    name: str
    describe: str
    function: str
    min_heads: int = 1
    needs_rewind: bool = False
    needs_readout: bool = False
    reads_expected: bool = False
    needs_blanks: bool = False
    streams: bool = False
    options: tuple[str, ...] = ()

    def load(self) -> DecodingMethodFunction:
        """Import the implementation."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


METHODS: dict[str, DecodingMethod] = {
    method.name: method
    for method in (
        DecodingMethod("greedy", "one token per step", "ntpseg.generation.greedy:greedy", streams=True),
        DecodingMethod(
            "speculative",
            "heads 1.. draft, head 0 verifies; the same result",
            "ntpseg.generation.speculative:speculative",
            min_heads=2,
            needs_rewind=True,
            streams=True,
        ),
        DecodingMethod(
            "jacobi",
            "whole masks are drafted and verified in one pass; the same result",
            "ntpseg.generation.jacobi:jacobi",
            needs_rewind=True,
            streams=True,
        ),
        DecodingMethod(
            "expected",
            "one token per step, the code nearest to the expected patch",
            "ntpseg.generation.greedy:expected",
            needs_readout=True,
            streams=True,
        ),
        DecodingMethod(
            "refine",
            "a draft of the whole mask from one pass, then passes that read the last draft",
            "ntpseg.generation.passes:refine",
            needs_readout=True,
            needs_blanks=True,
            options=("passes",),
        ),
        DecodingMethod(
            "sample",
            "the mean of several sampled masks",
            "ntpseg.generation.sampling:sample",
            reads_expected=True,
            options=("samples", "temperature", "top_p", "seed"),
        ),
    )
}
