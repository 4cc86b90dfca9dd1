"""Gradient filtering: within its stated bound, off by default, and never at the cost of the loss."""

from __future__ import annotations

import pytest
import torch
from loss_cases import draw, error

from ntpseg import HardTokens, ntp_loss
from ntpseg.losses import LossOptions


def peaked(threshold: float, **options):
    """Rows that are sure of their prediction, as in a trained model: most probabilities are tiny."""
    case = draw(2, 30, 2, 16, 300, slots=5, scale=3.0, gradient_filter=threshold, **options)
    case.labels = torch.where(case.labels == -100, -100, case.labels % 20)
    return case


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("threshold", [2.0**-12, 2.0**-6, 0.3])
def test_error_stays_within_the_bound(threshold: float, per_head: bool) -> None:
    exact, d_hidden, d_weight = peaked(0.0, per_head=per_head).run()
    case = peaked(threshold, per_head=per_head)
    result, f_hidden, f_weight = case.run()
    assert torch.equal(exact.loss, result.loss)
    # |dz - dz'| < threshold * g for each skipped class, g the row's weight: 1 / number of rows here
    rows = sum(int((case.labels[:, 1 + j :] != -100).sum()) for j in range(2))
    norms = case.weight.norm(dim=-1)
    bound = threshold / rows * float(norms.sum(-1).max())
    assert float((d_hidden - f_hidden).norm(dim=-1).max()) <= bound
    bound = threshold / rows * float(case.hidden.norm(dim=-1).sum())
    assert float((d_weight - f_weight).norm(dim=-1).max()) <= bound


def test_filters_something_and_keeps_what_matters() -> None:
    _, d_hidden, d_weight = peaked(0.0).run()
    _, f_hidden, f_weight = peaked(2.0**-12).run()
    untouched = (f_weight == 0).all(-1)
    assert untouched.float().mean() > 0.2
    assert d_weight[untouched].any()
    assert 0 < error(f_weight, d_weight) < 1e-3 and error(f_hidden, d_hidden) < 1e-3


def test_is_off_by_default() -> None:
    assert LossOptions().gradient_filter == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    _, d_hidden, d_weight = peaked(0.0, dtype=dtype).run()
    _, f_hidden, f_weight = peaked(2.0**-12, dtype=dtype).run()
    assert error(f_weight, d_weight) < 1e-2 and error(f_hidden, d_hidden) < 1e-2


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_hard_tokens_of_rows_without_weight_are_kept(backend: str) -> None:
    """Such a row's gradient is HET's alone: nothing of it is in units of probability."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 8, 16), torch.randn(20_000, 16) * 0.05
    labels, token_weights = torch.randint(0, 20_000, (1, 8)), torch.ones(1, 8)
    token_weights[0, 3] = 0
    found = []
    for threshold in (0.0, 2.0**-12):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        options = LossOptions(negatives=0, backend=backend, gradient_filter=threshold)
        het = HardTokens(torch.tensor([[3]]), torch.tensor([[77]]))
        out = ntp_loss(*leaves, labels, het=het, token_weights=token_weights, options=options)
        out.loss.backward()
        found.append((leaves[0].grad[0, 2], leaves[1].grad[77]))
    for one, other in zip(*found):
        assert other.norm() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
