"""A small sequence format and random batches of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ntpseg.models import NTPSegModel, causal_blocks, preset_config
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


@pytest.fixture(autouse=True)
def blocks_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequences here are shorter than those that block attention is chosen for."""
    monkeypatch.setattr(causal_blocks, "MIN_TOKENS", 2)


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


STEM = {"widths": [8, 12], "group_size": 4, "caption_dim": 6, "caption_hidden": 8}


@pytest.fixture
def make_feature_model():
    """A model with a stem for 12 x 12 images on a 3 x 3 grid, and its sequence format."""

    def make(
        front_end: str = "features", *, aligned: bool = True, stem: dict[str, Any] | None = None, **options: Any
    ) -> tuple[NTPSegModel, SequenceFormat]:
        torch.manual_seed(0)
        codes = 16 if front_end in ("both", "codes") else 0 if aligned else 1
        sequence = SequenceFormat(Vocabulary(40, codes, 8), (3, 3) if codes else None, (3, 3))
        fields = {
            "num_heads_k": 1,
            "negatives": 0,
            "het_weight": 0.0,
            "grid_positions": True,
            "front_end": front_end,
            "stem": None if front_end == "codes" else {**STEM, "aligned": aligned, **(stem or {})},
            "image_size": 12,
            "patch_size": 4,
            **options,
        }
        attention = fields.pop("attention", None)
        overrides = {**SMALL, **fields.pop("overrides", {})}
        config = preset_config("tiny", sequence, overrides=overrides, **fields)
        if attention is not None:
            config._attn_implementation = attention
        model = NTPSegModel(config)
        model.readout.set_patches(torch.rand(8, *[fields["patch_size"]] * 2))
        return model, sequence

    return make


@pytest.fixture
def feature_batch():
    """Function: what a collator would make of three sequences with captions of these lengths."""

    def make(sequence: SequenceFormat, lengths: tuple[int, ...] = (2, 5, 3), channels: int = 1) -> dict[str, Tensor]:
        rng = np.random.default_rng(1)
        image_grid, codes = sequence.image_grid, max(1, sequence.vocabulary.image_codes)
        rows = [
            sequence.build(
                list(rng.integers(0, 40, n)),
                None if image_grid is None else rng.integers(0, codes, image_grid),
                rng.integers(0, 8, (3, 3)),
            )
            for n in lengths
        ]
        longest = max(len(ids) for ids, _ in rows)
        ids = np.full((len(rows), longest), sequence.vocabulary.pad)
        labels = np.full((len(rows), longest), -100)
        for row, (a, b) in enumerate(rows):
            ids[row, : len(a)], labels[row, : len(b)] = a, b
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "grid_ids": torch.tensor(sequence.grid_ids(ids)),
            "pixel_values": torch.rand(len(rows), channels, 12, 12) * 2 - 1,
            "mask_pixels": (torch.rand(len(rows), 12, 12) < 0.4).float(),
        }

    return make
