"""The read-out of codes as patches, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from ntpseg.models.readout import PatchReadout

CODES, SIDE = 6, 3


@pytest.fixture
def readout() -> PatchReadout:
    module = PatchReadout(CODES, SIDE)
    module.set_patches(torch.rand(CODES, SIDE, SIDE))
    return module


def test_expected(readout: PatchReadout) -> None:
    logits = torch.randn(2, 4, CODES, dtype=torch.float64)
    got = readout.expected(logits)
    for row in range(2):
        for cell in range(4):
            weights = [math.exp(z) for z in logits[row, cell].tolist()]
            for pixel in range(SIDE**2):
                mean = sum(w * float(readout.patches[v, pixel]) for v, w in enumerate(weights)) / sum(weights)
                assert float(got[row, cell, pixel]) == pytest.approx(mean, abs=1e-12)
    certain = torch.full((CODES,), -1e9)
    certain[2] = 0
    assert torch.equal(readout.expected(certain), readout.patches[2])


def test_nearest(readout: PatchReadout) -> None:
    patches = torch.rand(50, SIDE**2, dtype=torch.float64)
    for patch, code in zip(patches, readout.nearest(patches)):
        distances = [sum((a - float(b)) ** 2 for a, b in zip(patch.tolist(), row)) for row in readout.patches]
        assert int(code) == min(range(CODES), key=distances.__getitem__)
    assert readout.nearest(readout.patches).tolist() == list(range(CODES))
    assert readout.nearest(patches.view(5, 10, -1)).shape == (5, 10)
    readout.set_patches(torch.zeros(CODES, SIDE, SIDE))
    assert (readout.nearest(patches) == 0).all(), "ties go to the lowest"


def test_similarity(readout: PatchReadout) -> None:
    got = readout.similarity(2.0)
    for y in range(CODES):
        near = [float((readout.patches[y] - readout.patches[v]).abs().sum()) for v in range(CODES)]
        weights = [math.exp(-d / 2.0) for d in near]
        for v in range(CODES):
            assert float(got[y, v]) == pytest.approx(weights[v] / sum(weights), abs=1e-6)
    assert (readout.similarity(1e-3).diagonal() > 0.999).all()


def test_other_patches_are_refused(readout: PatchReadout) -> None:
    for shape in ((CODES + 1, SIDE, SIDE), (CODES, SIDE, SIDE + 1)):
        with pytest.raises(
            ValueError, match=rf"patches must hold 6 codes of 9 pixels, got \[{shape[0]}, 3, {shape[2]}\]"
        ):
            readout.set_patches(torch.zeros(shape))
