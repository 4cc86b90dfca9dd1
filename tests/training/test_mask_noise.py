"""Noise on the mask tokens that the model reads: only codes, only in training, the same after a resume."""

from __future__ import annotations

import numpy as np
import pytest

from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary
from ntpseg.training.config import load_config
from ntpseg.training.dataset import TokenDataset

SEQUENCE = SequenceFormat(Vocabulary(text_size=300, image_codes=16, mask_codes=64), (8, 8), (8, 8))


class Codes:
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.image_codes = rng.integers(0, 16, (5, 1, 8, 8))
        self.mask_codes = rng.integers(0, 64, (5, 1, 8, 8))

    def text_ids(self, index: int, variant: int = 0) -> list[int]:
        return [1, 2, index]


def sequences(noise: float, *, augmented: bool = True, epoch: int = 0) -> list[dict[str, np.ndarray]]:
    dataset = TokenDataset(Codes(), SEQUENCE, seed=3, augmented=augmented, mask_noise=noise)
    dataset.set_epoch(epoch)
    return [dataset[i] for i in range(len(dataset))]


def test_only_mask_codes_change_and_labels_stay() -> None:
    low, high = SEQUENCE.vocabulary.mask_range
    changed = []
    for plain, noisy in zip(sequences(0.0), sequences(0.8)):
        assert np.array_equal(plain["labels"], noisy["labels"])
        differ = plain["input_ids"] != noisy["input_ids"]
        assert np.all(plain["labels"][differ] >= low) and np.all(plain["labels"][differ] < high)
        assert np.all(noisy["input_ids"][differ] >= low) and np.all(noisy["input_ids"][differ] < high)
        changed.append(differ.sum() / 64)
    # Each sequence draws its own share from 0 to 0.8.
    assert 0.1 < np.mean(changed) < 0.7 and np.std(changed) > 0.02


def test_same_epoch_same_noise_another_epoch_another() -> None:
    first, again, later = sequences(0.8), sequences(0.8), sequences(0.8, epoch=1)
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again))
    assert any(not np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, later))


def test_validation_reads_the_truth() -> None:
    for plain, other in zip(sequences(0.0), sequences(0.8, augmented=False)):
        assert np.array_equal(plain["input_ids"], other["input_ids"])


@pytest.mark.parametrize("value", ["-0.1", "1.5"])
def test_refuses_a_share_outside_0_to_1(value: str) -> None:
    with pytest.raises(ValueError, match="mask_noise"):
        load_config("demo", [f"data.mask_noise={value}", "data.path=x", "output=y"])


def test_refuses_no_minutes() -> None:
    with pytest.raises(ValueError, match="max_minutes"):
        load_config("demo", ["max_minutes=0", "data.path=x", "output=y"])
