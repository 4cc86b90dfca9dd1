"""Losses on pixels against loops in float64, with numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch

from ntpseg.losses.dense import (
    DenseLossOptions,
    from_patches,
    pixel_loss,
    soft_dice_loss,
    soft_target_loss,
    to_patches,
)

WIDE = torch.float64


def naive_dice(p: list[float], t: list[float], smooth: float) -> float:
    return 1 - (2 * sum(a * b for a, b in zip(p, t)) + smooth) / (sum(p) + sum(t) + smooth)


@pytest.mark.parametrize("smooth", [1.0, 0.1])
def test_soft_dice(smooth: float) -> None:
    p, t = torch.rand(3, 4, 5, dtype=WIDE), (torch.rand(3, 4, 5) < 0.4).to(WIDE)
    t[1] = 0
    expected = [naive_dice(a.ravel().tolist(), b.ravel().tolist(), smooth) for a, b in zip(p, t)]
    torch.testing.assert_close(soft_dice_loss(p, t, smooth), torch.tensor(expected, dtype=WIDE))
    assert float(soft_dice_loss(t[1:2], t[1:2])) == 0, "empty against empty is right"
    assert torch.autograd.gradcheck(lambda x: soft_dice_loss(x, t, smooth), p.requires_grad_())


def test_pixel_loss() -> None:
    logits, target = torch.randn(3, 4, 5, dtype=WIDE) * 3, torch.rand(3, 4, 5, dtype=WIDE)
    expected = []
    for z, t in zip(logits, target):
        pairs = list(zip(z.ravel().tolist(), t.ravel().tolist()))
        p = [1 / (1 + math.exp(-a)) for a, _ in pairs]
        entropy = -sum(b * math.log(q) + (1 - b) * math.log(1 - q) for q, (_, b) in zip(p, pairs)) / 20
        expected.append(entropy + naive_dice(p, [b for _, b in pairs], 1.0))
    torch.testing.assert_close(pixel_loss(logits, target), torch.tensor(expected, dtype=WIDE))
    assert torch.autograd.gradcheck(lambda x: pixel_loss(x, target), logits.requires_grad_())
    assert torch.isfinite(pixel_loss(torch.full((1, 4), 500.0), torch.zeros(1, 4))).all()


def test_soft_targets() -> None:
    logits, target = torch.randn(2, 3, 5, dtype=WIDE), torch.randint(5, (2, 3))
    similarity = torch.rand(5, 5, dtype=WIDE)
    similarity /= similarity.sum(1, keepdim=True)
    expected = []
    for row in range(2):
        total = 0.0
        for cell in range(3):
            z = logits[row, cell].tolist()
            norm = math.log(sum(math.exp(a) for a in z))
            total -= sum(float(similarity[target[row, cell], v]) * (z[v] - norm) for v in range(5))
        expected.append(total / 3)
    torch.testing.assert_close(soft_target_loss(logits, target, similarity), torch.tensor(expected, dtype=WIDE))
    hard = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(
        soft_target_loss(logits, target, torch.eye(5, dtype=WIDE)), hard.unflatten(0, (2, 3)).mean(1)
    )
    assert torch.autograd.gradcheck(lambda x: soft_target_loss(x, target, similarity), logits.requires_grad_())


def test_patches() -> None:
    picture = torch.arange(2 * 6 * 6, dtype=torch.float32).view(2, 6, 6)
    patches = to_patches(picture, 3)
    assert patches.shape == (2, 4, 9)
    for image in range(2):
        for cell in range(4):
            for pixel in range(9):
                y, x = 3 * (cell // 2) + pixel // 3, 3 * (cell % 2) + pixel % 3
                assert patches[image, cell, pixel] == picture[image, y, x]
    assert torch.equal(from_patches(patches, (2, 2)), picture)
    # A grid that is not square tells rows from columns.
    wide = from_patches(torch.arange(6 * 4, dtype=torch.float32).view(1, 6, 4), (2, 3))
    assert wide.shape == (1, 4, 6)
    assert wide[0, 0].tolist() == [0, 1, 4, 5, 8, 9] and wide[0, 2].tolist() == [12, 13, 16, 17, 20, 21]


@pytest.mark.parametrize("name", ["dice", "pixel", "soft"])
def test_wrong_options_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"dense_loss\.{name} must be a number >= 0, got -0.5"):
        DenseLossOptions(**{name: -0.5})
    with pytest.raises(ValueError, match=r"dense_loss\.soft_temperature must be a number > 0, got 0"):
        DenseLossOptions(soft_temperature=0)
