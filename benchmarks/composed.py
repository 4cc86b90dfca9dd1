"""CE, TCL and HET composed of PyTorch operators, as one would write them by hand: the baseline of the whole loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.operands import Operands

_CHUNK_BYTES = 256 << 20


def cross_entropy(rows: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """CE with whole logits, softmax in float32."""
    return F.cross_entropy((rows @ weight.t()).float(), target)


def full_loss(
    rows: Tensor, weight: Tensor, target: Tensor, earlier: Tensor, exists: Tensor, hard_row: Tensor, hard_token: Tensor
) -> tuple[Tensor, Tensor]:
    """All three terms from whole logits.

    Args:
        rows, weight, target, earlier, exists, hard_row, hard_token: see `Operands`.

    Returns:
        The loss, and the predictions ``[R]``.
    """
    logits = (rows @ weight.t()).float()
    prediction = logits.detach().argmax(1)
    z_y = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    negative = prediction[earlier]
    z_neg = logits.gather(1, negative)
    z_hard = logits[hard_row, hard_token]
    terms = _tcl_het(z_neg, z_hard, z_y, negative, exists, target, hard_row)
    return F.cross_entropy(logits, target) + terms, prediction


def tcl_het(operands: Operands, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """TCL and HET alone, to add to a cross-entropy that stores no logits.

    The predictions take another product, in chunks of rows; the few logits that the terms need are dot products.

    Returns:
        The sum of both terms, and the predictions ``[R]``.
    """
    step = max(1, _CHUNK_BYTES // (len(weight) * rows.itemsize))
    with torch.no_grad():
        prediction = torch.cat([(part @ weight.t()).argmax(1) for part in rows.split(step)])
    earlier, exists = operands.predecessors
    hard_row, hard_token = operands.hard
    negative = prediction[earlier]
    target = operands.target
    z_y = (rows * weight[target]).sum(1, dtype=torch.float32)
    z_neg = z_y.new_empty(negative.shape)
    if negative.shape[1]:
        z_neg = torch.stack([(rows * weight[token]).sum(1, dtype=torch.float32) for token in negative.unbind(1)], 1)
    z_hard = (rows[hard_row] * weight[hard_token]).sum(1, dtype=torch.float32)
    return _tcl_het(z_neg, z_hard, z_y, negative, exists, target, hard_row), prediction


def _tcl_het(
    z_neg: Tensor, z_hard: Tensor, z_y: Tensor, negative: Tensor, exists: Tensor, target: Tensor, hard_row: Tensor
) -> Tensor:
    counts = exists & (negative != target.unsqueeze(1))
    excess = (z_neg - z_y.unsqueeze(1)).masked_fill(~counts, -torch.inf)
    tcl = torch.cat([excess, torch.zeros_like(excess[:, :1])], 1).logsumexp(1).mean()
    return tcl + F.softplus(z_hard - z_y[hard_row]).mean()
