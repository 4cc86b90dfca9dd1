"""The loss and its gradients in float64: the truth that every provider of `loss` must meet.

Plain autograd over some rows' logits at a time, with the counts of the whole batch. Restated from the design rather
than taken from the package, and able to take the negatives from a provider's own predictions: two logits that differ
by less than a rounding may be ordered either way, and TCL then has another, equally right, negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.operands import Operands

_LOGIT_BYTES = 512 << 20


@dataclass(frozen=True)
class Truth:
    """Float64 results.

    Attributes:
        loss: 0-dim; d_rows: ``[R, D]``; d_weight: ``[V, D]``.
        prediction: ``[R]`` int64, the predictions that the negatives were taken from.
        gap: how far a prediction's logit is below its row's greatest, over the greatest |logit|; the worst row.
    """

    loss: Tensor
    d_rows: Tensor
    d_weight: Tensor
    prediction: Tensor
    gap: float


def truth(operands: Operands, *, terms: bool, prediction: Tensor | None = None) -> Truth:
    """CE, or ``CE + TCL + HET`` with weights and temperature 1, and its gradients.

    Args:
        operands: of any shape; the logits of at most 512 MiB of rows are there at once, several times over.
        terms: whether TCL and HET are part of it.
        prediction: ``[R]`` whose negatives to use; None: the float64 arg-max's own.
    """
    weight = operands.weight.double().requires_grad_()
    rows, target = operands.rows, operands.target
    count = len(target)
    d_rows = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    used = torch.empty_like(target)
    loss = torch.zeros((), dtype=torch.float64, device=rows.device)
    gap = 0.0
    hard_row, hard_token = operands.hard
    earlier, exists = operands.predecessors
    step = max(1, _LOGIT_BYTES // (8 * len(weight)))
    for start in range(0, count, step):
        cut = slice(start, min(start + step, count))
        hidden = rows[cut].double().requires_grad_()
        y = target[cut]
        z = hidden @ weight.t()
        z_y = z.gather(1, y.unsqueeze(1)).squeeze(1)
        logits = z.detach()
        row_max, argmax = logits.max(1)
        used[cut] = argmax if prediction is None else prediction[cut]
        below = row_max - logits.gather(1, used[cut].unsqueeze(1)).squeeze(1)
        gap = max(gap, float((below / logits.abs().amax()).max()))
        part = (z.logsumexp(1) - z_y).sum() / count
        if terms:
            negative = used[earlier[cut]]
            counts = exists[cut] & (negative != y.unsqueeze(1))
            excess = (z.gather(1, negative) - z_y.unsqueeze(1)).masked_fill(~counts, -torch.inf)
            # the zero is the 1 in log(1 + sum)
            part = part + torch.cat([excess, torch.zeros_like(excess[:, :1])], 1).logsumexp(1).sum() / count
            here = (hard_row >= cut.start) & (hard_row < cut.stop)
            row = hard_row[here] - cut.start
            part = part + F.softplus(z[row, hard_token[here]] - z_y[row]).sum() / len(hard_row)
        part.backward()
        assert hidden.grad is not None
        d_rows[cut] = hidden.grad
        loss += part.detach()
    assert weight.grad is not None
    return Truth(loss, d_rows, weight.grad, used, gap)
