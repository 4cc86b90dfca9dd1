"""The table of decoding methods is all that a new method needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import make_model, make_prompts, sequence_format

from ntpseg.generation import METHODS, DecodingOptions, generate_masks
from ntpseg.generation.decoder import DecodedBatch
from ntpseg.generation.methods import DecodingMethod


def always_three(heads: Any, decoder: Any, target: Any, prompts: Any, options: Any) -> DecodedBatch:
    """A method that reads the prompts and answers code 3 everywhere."""
    decoder.start(prompts, prompts.max_length)
    shape = len(prompts), len(target.free)
    return DecodedBatch(torch.full(shape, 3), torch.zeros(shape), 0)


def test_every_method_has_its_implementation() -> None:
    for name, method in METHODS.items():
        assert method.name == name and method.describe
        assert callable(method.load())


@pytest.mark.parametrize("decoder", ["native", "huggingface"])
def test_an_entry_of_the_table_makes_a_method(monkeypatch: pytest.MonkeyPatch, decoder: Any) -> None:
    method = DecodingMethod("three", "code 3 everywhere", f"{__name__}:always_three")
    monkeypatch.setitem(METHODS, "three", method)
    sequence = sequence_format()
    options = DecodingOptions(method="three", decoder=decoder)
    result = generate_masks(make_model(sequence), make_prompts(sequence, 2), sequence=sequence, options=options)
    np.testing.assert_array_equal(result.codes, np.full((2, *sequence.mask_grid), 3))
    assert result.steps == 0
