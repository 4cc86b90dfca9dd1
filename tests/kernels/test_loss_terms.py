"""The loss and its parts from row results, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ntpseg.kernels.loss_terms import loss_terms
from ntpseg.kernels.tl_utils import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")

FACTORS = {"tcl_weight": 0.3, "het_weight": 2.0, "z_loss": 1e-3}


@pytest.mark.parametrize("rows", [0, 1, 130, 16384, 40_001])
def test_agrees_with_float64(rows: int) -> None:
    make = torch.Generator().manual_seed(rows)
    # five orders of magnitude: what a sum in fp32 would lose
    terms = [torch.rand(rows, generator=make) * 10.0 ** torch.randint(-3, 3, (rows,), generator=make) for _ in range(6)]
    entry_weight = torch.tensor(0.07)
    ntp_weight, row_weight, nll, tcl, het, lse = (x.double() for x in terms)
    expected = torch.stack(
        [
            (ntp_weight * nll).sum(),
            (row_weight * nll).sum(),
            (row_weight * tcl).sum(),
            het.sum() * entry_weight.double(),
            (row_weight * lse.square()).sum(),
        ]
    )
    loss, parts = loss_terms(*terms, entry_weight, **FACTORS)
    assert loss.shape == () and parts.shape == (5,) and loss.dtype == parts.dtype == torch.float32
    torch.testing.assert_close(parts.double(), expected, rtol=1e-7, atol=0)
    wanted = expected[1] + 0.3 * expected[2] + 2.0 * expected[3] + 1e-3 * expected[4]
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-7, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    terms = [torch.ones(9) for _ in range(6)]
    terms[2][4] = value
    loss, parts = loss_terms(*terms, torch.ones(()), **FACTORS)
    assert not loss.isfinite() and not parts[:2].isfinite().any() and parts[2:].isfinite().all()
