"""Made-up pictures: a smooth grey image with one bright ellipse, and the ellipse as its mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def _ellipses(count: int, size: int, channels: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images float [count, channels, size, size] in [-1, 1] and masks float [count, 1, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre, axis = torch.rand(count, 2, generator=generator), torch.rand(count, 2, generator=generator)
    centre, axis = (centre * 0.5 + 0.25) * size, (axis * 0.2 + 0.1) * size
    dy = (y - centre[:, 0, None, None]) / axis[:, 0, None, None]
    dx = (x - centre[:, 1, None, None]) / axis[:, 1, None, None]
    masks = (dy**2 + dx**2 < 1).float()[:, None]
    shade = torch.stack([(x + y) / (2 * size)] * channels) - 0.7
    noise = 0.05 * torch.randn(count, channels, size, size, generator=generator)
    return (shade + 0.8 * masks + noise).clamp(-1, 1), masks


def _dice(probability: Tensor, mask: Tensor) -> float:
    """Mean Dice over a batch of [B, 1, S, S]; empty against empty is 1."""
    p, t = (probability > 0.5).flatten(1), (mask > 0.5).flatten(1)
    total = p.sum(1) + t.sum(1)
    return float(torch.where(total > 0, 2 * (p & t).sum(1) / total.clamp(min=1), 1.0).mean())


@pytest.fixture(scope="session")
def ellipses():
    """The function that draws pictures and masks."""
    return _ellipses


@pytest.fixture(scope="session")
def dice():
    """The function that compares masks."""
    return _dice


@pytest.fixture(scope="session")
def compact(ellipses):
    """A `CompactVQ` trained on ellipses at 64 px."""
    from ntpseg.tokenizers.compact import CompactVQOptions
    from ntpseg.tokenizers.compact_training import train_compact_vq

    images, masks = ellipses(120, 64)
    options = CompactVQOptions(image_codes=64, mask_codes=64, steps=60, batch_size=16, width=32)
    return train_compact_vq(images, masks, options, progress=False)
