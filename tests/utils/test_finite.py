from __future__ import annotations

import pytest
import torch
from torch import nn

from ntpseg.utils.finite import check_finite, non_finite_tensor


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_weight_or_buffer_that_is_not_finite_is_named(value) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert non_finite_tensor(model) is None
    model[1].running_mean[1] = value
    assert non_finite_tensor(model) == "1.running_mean"
    with torch.no_grad():
        model[0].weight[1, 2] = value
    assert non_finite_tensor(model) == "0.weight"
    with pytest.raises(ValueError, match=r"the model x must have finite weights, got nan or inf in '0.weight'"):
        check_finite(model, "the model x")
    check_finite(object(), "no module")
