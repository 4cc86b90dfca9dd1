"""One pass over blocks of logits in plain PyTorch, on the CPU and on GPUs.

DESIGN: "target-anchored". Here a block's logits are whole before anything is exponentiated, so the anchor can be the
row's maximum, which never overflows; the gaps that TCL and HET need are gathered from the raw logits. A block of
softmax probabilities is touched up in place at the few classes of TCL, HET and the target, and feeds the two
matrix products of the gradients. Logits are never recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntpseg.losses import products
from ntpseg.losses.backends import RowsResult, gradient_dtype
from ntpseg.losses.options import LossOptions
from ntpseg.losses.rows import Rows

_NEXT_TO_NOTHING = 1e-30


def rows_loss(rows: Rows, weight: Tensor, options: LossOptions, *, hidden_grad: bool, weight_grad: bool) -> RowsResult:
    """See `ntpseg.losses.backends` for the contract."""
    count, _ = rows.hidden.shape
    work = rows.share.dtype
    device = rows.hidden.device
    matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
    classes = matrices.shape[1]
    kept = gradient_dtype(weight.dtype)

    prediction = torch.full((count,), -1, dtype=torch.int64, device=device)
    nll, margin, tcl, het, lse = torch.zeros(5, count, dtype=work, device=device)
    d_hidden = torch.empty(rows.hidden.shape, dtype=kept, device=device) if hidden_grad else None
    d_weight = torch.zeros(matrices.shape, dtype=work, device=device) if weight_grad else None

    size = products.rows_per_block(classes, work, device, options.chunk_bytes, count)
    block = torch.empty(size, classes, dtype=work, device=device)
    for matrix, (start, stop) in enumerate(rows.segments):
        for low in range(start, stop, size):
            high = min(low + size, stop)
            part = slice(low, high)
            z = products.logits(rows.hidden[part], matrices[matrix], out=block[: high - low])
            real = rows.target[part] >= 0
            target = rows.target[part].clamp_min(0)

            z_max, best = z.max(1)
            z_y = z.gather(1, target.unsqueeze(1)).squeeze(1)
            prediction[part] = torch.where(real, best, -1)
            margin[part] = torch.where(real, z_max - z_y, 0.0)

            touch = _touches(z, z_y, target, prediction, rows, part, options)
            tcl[part] = torch.where(real, touch.tcl, 0.0)
            het[part] = touch.het

            probability, row_lse = products.softmax_(z, z_max, best)
            lse[part] = torch.where(real, row_lse, 0.0)
            nll[part] = torch.where(real, row_lse - z_y, 0.0)
            if not (hidden_grad or weight_grad):
                continue

            unit = _touch_up(probability, touch, target, row_lse, rows, part, options, weight.dtype)
            products.gradients(
                probability,
                unit,
                rows.hidden[part],
                matrices[matrix],
                d_hidden[part] if d_hidden is not None else None,
                d_weight[matrix] if d_weight is not None else None,
                threshold=options.gradient_filter,
            )

    if d_weight is not None:
        d_weight = d_weight.reshape(weight.shape).to(kept)
    return RowsResult(prediction, nll, margin, tcl, het, lse, d_hidden, d_weight)


@dataclass(frozen=True)
class _Touches:
    """The few classes of each row that TCL and HET reach: ``[C, m + h]`` with their softmax-like shares."""

    token: Tensor  # int64, 0 where there is none
    negative_pull: Tensor  # [C, m] d tcl / d z[negative]
    hard_pull: Tensor  # [C, h] d het / d z[hard token]
    tcl: Tensor  # [C]
    het: Tensor  # [C]


def _touches(
    z: Tensor, z_y: Tensor, target: Tensor, prediction: Tensor, rows: Rows, part: slice, options: LossOptions
) -> _Touches:
    """Negatives and hard tokens of one block, from the raw logits."""
    start, stop = part.start, part.stop
    back = torch.arange(1, options.negatives + 1, device=z.device)
    earlier = torch.arange(start, stop, device=z.device).unsqueeze(1) - back
    negative = prediction[earlier.clamp_min(0)]
    exists = (back <= rows.reach[part].unsqueeze(1)) & (negative != target.unsqueeze(1)) & (negative >= 0)
    hard = rows.het[part]

    token = torch.cat([torch.where(exists, negative, 0), hard.clamp_min(0)], 1)
    gap = (z.gather(1, token) - z_y.unsqueeze(1)) / options.temperature
    gap = gap.masked_fill(~torch.cat([exists, hard >= 0], 1), -torch.inf)
    near, far = gap.split([options.negatives, hard.shape[1]], 1)

    tcl = torch.cat([near, torch.zeros_like(near[:, :1]) if options.negatives else near.new_zeros(len(near), 1)], 1)
    tcl = tcl.logsumexp(1)
    return _Touches(
        token=token,
        negative_pull=torch.exp(near - tcl.unsqueeze(1)) / options.temperature,
        hard_pull=torch.sigmoid(far) / options.temperature,
        tcl=tcl,
        het=torch.logaddexp(far, torch.zeros_like(far)).sum(1),
    )


def _touch_up(
    probability: Tensor,
    touch: _Touches,
    target: Tensor,
    lse: Tensor,
    rows: Rows,
    part: slice,
    options: LossOptions,
    operand: torch.dtype,
) -> Tensor:
    """Turns probabilities into logit gradients in units of the returned ``[C]``: ``dz = unit * block``."""
    share = rows.share[part]
    softmax_scale = share if not options.z_loss else share * (1 + 2 * options.z_loss * lse)
    near = touch.negative_pull * (options.tcl_weight * share).unsqueeze(1)
    far = touch.hard_pull * (options.het_weight * rows.het_share)
    pull = torch.cat([near, far], 1)
    on_target = -(share + pull.sum(1))

    if operand == torch.float16:
        # float16 could not hold the ratio of a hard token's weight to its row's
        unit = torch.maximum(softmax_scale.abs(), on_target.abs())
        probability.mul_((softmax_scale / unit.masked_fill(unit == 0, 1.0)).unsqueeze(1))
    else:
        # a row may carry a hard token without any CE weight: this makes its probabilities vanish beside it
        unit = torch.where(softmax_scale == 0, on_target.abs().clamp_max(_NEXT_TO_NOTHING), softmax_scale)
    token = torch.cat([touch.token, target.unsqueeze(1)], 1)
    value = torch.cat([pull, on_target.unsqueeze(1)], 1) / unit.masked_fill(unit == 0, 1.0).unsqueeze(1)
    products.scatter_add_(probability, token, value)
    return unit
