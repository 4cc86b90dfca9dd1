"""Dice of decoded masks: 1 for a model that decodes the truth, and what the metric says otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ntpseg import generation
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary
from ntpseg.training.free_running import FreeRunningDice

SEQUENCE = SequenceFormat(Vocabulary(text_size=300, image_codes=16, mask_codes=2), (4, 4), (4, 4))


class OnePixelPerCode:
    def decode_mask(self, codes: torch.Tensor) -> torch.Tensor:
        return codes[:, None].float()


class Cache:
    def __init__(self, masks: np.ndarray) -> None:
        self.image_codes = np.zeros((len(masks), 1, 4, 4), np.int64)
        self.mask_codes = masks[:, None]

    def text_ids(self, index: int, variant: int = 0) -> list[int]:
        return [index % 300]


@pytest.fixture
def masks() -> np.ndarray:
    result = np.zeros((10, 4, 4), np.int64)
    result[:, :2] = 1
    return result


def score(monkeypatch: pytest.MonkeyPatch, masks: np.ndarray, decoded: np.ndarray, cases: int = 64) -> float:
    monkeypatch.setattr(
        generation, "generate_masks", lambda *args, **kwargs: SimpleNamespace(codes=decoded, probability=None)
    )
    return FreeRunningDice.from_tokens(Cache(masks), SEQUENCE, OnePixelPerCode(), cases)(None)["token_dice"]  # type: ignore[arg-type]


def test_right_empty_and_half(monkeypatch: pytest.MonkeyPatch, masks: np.ndarray) -> None:
    assert score(monkeypatch, masks, masks) == pytest.approx(1.0)
    assert score(monkeypatch, masks, np.zeros_like(masks)) == pytest.approx(0.0)
    half = masks.copy()
    half[:, 1] = 0
    assert score(monkeypatch, masks, half) == pytest.approx(2 * 4 / (4 + 8))


def test_cases_are_spread_over_the_split(masks: np.ndarray) -> None:
    dice = FreeRunningDice.from_tokens(Cache(masks), SEQUENCE, OnePixelPerCode(), 5)  # type: ignore[arg-type]
    assert [int(prompt[1]) for prompt in dice.prompts] == [0, 2, 4, 6, 8]
