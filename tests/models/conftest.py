"""A small sequence format and random batches of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ntpseg.models import NTPSegModel, preset_config
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def sequence() -> SequenceFormat:
    return SequenceFormat(Vocabulary(40, 16, 8), (3, 3), (3, 3))


@pytest.fixture
def make_model(sequence: SequenceFormat):
    def make(preset: str = "tiny", overrides: dict[str, Any] | None = None, **options: Any) -> NTPSegModel:
        torch.manual_seed(0)
        options = {"num_heads_k": 3, "grid_positions": True, **options}
        return NTPSegModel(preset_config(preset, sequence, overrides={**SMALL, **(overrides or {})}, **options))

    return make


@pytest.fixture
def batch(sequence: SequenceFormat) -> dict[str, Tensor]:
    """Three sequences with captions of different lengths, padded on the right."""
    rng = np.random.default_rng(1)
    rows = [
        sequence.build(list(rng.integers(0, 40, n)), rng.integers(0, 16, (3, 3)), rng.integers(0, 8, (3, 3)))
        for n in (2, 5, 3)
    ]
    length = max(len(ids) for ids, _ in rows)
    ids = np.full((3, length), sequence.vocabulary.pad)
    labels = np.full((3, length), -100)
    for row, (a, b) in enumerate(rows):
        ids[row, : len(a)], labels[row, : len(b)] = a, b
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "grid_ids": torch.tensor(sequence.grid_ids(ids)),
    }
