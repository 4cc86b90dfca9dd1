"""Which mask tokens are read in training: shares, blanks, and the same ones by the same seed."""

from __future__ import annotations

import pytest
import torch

from ntpseg.models.mask_inputs import BLANK, MaskInputOptions, mask_inputs

ROWS, CELLS, CODES = 4000, 32, 1000
TRUE = torch.arange(CELLS).expand(ROWS, -1)
DRAFT = torch.full((ROWS, CELLS), 500)


def draw(own: torch.Tensor | None = DRAFT, seed: int = 0, **options: float) -> torch.Tensor:
    torch.manual_seed(seed)
    return mask_inputs(TRUE, own, CODES, MaskInputOptions(**options))


def test_nothing_is_replaced_when_every_share_is_0() -> None:
    assert torch.equal(draw(replaced=0, draft=0, blank=0), TRUE)


def test_blanks_are_whole_sequences() -> None:
    read = draw(replaced=0, blank=0.3)
    blank = read == BLANK
    assert torch.equal(blank.all(1), blank.any(1))
    assert blank[:, 0].float().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(read[~blank], TRUE[~blank])
    assert (draw(replaced=1, blank=1) == BLANK).all()


@pytest.mark.parametrize("most", [1.0, 0.4])
def test_each_sequence_draws_its_own_share(most: float) -> None:
    share = (draw(replaced=most, draft=1, blank=0) != TRUE).float().mean(1)
    # Uniform from 0 to the largest share.
    assert share.mean() == pytest.approx(most / 2, abs=0.02)
    assert share.quantile(0.25) == pytest.approx(most / 4, abs=0.03)
    assert share.quantile(0.75) == pytest.approx(3 * most / 4, abs=0.03)


def test_shares_of_drafts_and_noise() -> None:
    read = draw(replaced=1, draft=0.6, blank=0)
    draft, kept = (read == 500).float().mean(), (read == TRUE).float().mean()
    assert draft == pytest.approx(0.5 * 0.6, abs=0.02)
    assert kept == pytest.approx(0.5, abs=0.02)
    # Half of the noise are codes of the same mask, all below 32, and half any code.
    noise = read[(read != TRUE) & (read != 500)]
    assert (noise < CELLS).float().mean() == pytest.approx(0.5, abs=0.03)
    random = noise[noise >= CELLS].float()
    assert random.min() < 60 and random.max() > 970 and random.mean() == pytest.approx(516, abs=15)
    without = draw(None, replaced=1, draft=0.6, blank=0)
    assert (without == 500).float().mean() < 0.01 and (without != TRUE).float().mean() == pytest.approx(0.5, abs=0.05)


def test_the_seed_decides() -> None:
    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(seed=1))


@pytest.mark.parametrize("name", ["replaced", "draft", "blank", "second_pass"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_wrong_shares_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"mask_inputs\.{name} must be a number >= 0 and <= 1, got {value}"):
        MaskInputOptions(**{name: value})
