"""The parts of the loss and the loss itself from the row results, in one launch.

Reference: ``ntp = (ntp_weight * nll).sum()``, ``nktp = (row_weight * nll).sum()``, ``tcl = (row_weight * tcl).sum()``,
``het = het.sum() * entry_weight``, ``z = (row_weight * lse**2).sum()`` and
``loss = nktp + tcl_weight * tcl + het_weight * het + z_loss * z``, all in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ntpseg.kernels.tl_utils import INTERPRETED


@triton.jit(do_not_specialize=["rows"])
def loss_terms_kernel(
    ntp_weight_ptr,
    row_weight_ptr,
    nll_ptr,
    tcl_ptr,
    het_ptr,
    lse_ptr,
    entry_weight_ptr,
    loss_ptr,
    parts_ptr,
    rows,
    tcl_weight,
    het_weight,
    z_loss,
    BLOCK_SIZE: tl.constexpr,
):
    ntp_sum = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    nktp_sum = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    tcl_sum = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    het_sum = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    z_sum = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    for start in range(0, rows, BLOCK_SIZE):
        row = start + tl.arange(0, BLOCK_SIZE)
        mask = row < rows
        row_weight = tl.load(row_weight_ptr + row, mask=mask, other=0.0).to(tl.float64)
        nll = tl.load(nll_ptr + row, mask=mask, other=0.0).to(tl.float64)
        lse = tl.load(lse_ptr + row, mask=mask, other=0.0).to(tl.float64)
        ntp_sum += tl.load(ntp_weight_ptr + row, mask=mask, other=0.0).to(tl.float64) * nll
        nktp_sum += row_weight * nll
        tcl_sum += row_weight * tl.load(tcl_ptr + row, mask=mask, other=0.0).to(tl.float64)
        het_sum += tl.load(het_ptr + row, mask=mask, other=0.0).to(tl.float64)
        z_sum += row_weight * lse * lse
    ntp = tl.sum(ntp_sum, 0)
    nktp = tl.sum(nktp_sum, 0)
    tcl = tl.sum(tcl_sum, 0)
    het = tl.sum(het_sum, 0) * tl.load(entry_weight_ptr).to(tl.float64)
    z = tl.sum(z_sum, 0)
    # the factors come as fp32 scalars
    loss = nktp + tcl_weight * tcl + het_weight * het + z_loss * z
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(parts_ptr, ntp.to(tl.float32))
    tl.store(parts_ptr + 1, nktp.to(tl.float32))
    tl.store(parts_ptr + 2, tcl.to(tl.float32))
    tl.store(parts_ptr + 3, het.to(tl.float32))
    tl.store(parts_ptr + 4, z.to(tl.float32))


def loss_terms(
    ntp_weight: Tensor,
    row_weight: Tensor,
    nll: Tensor,
    tcl: Tensor,
    het: Tensor,
    lse: Tensor,
    entry_weight: Tensor,
    *,
    tcl_weight: float,
    het_weight: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """Sums over the rows in a fixed order, in float64: one program, for the sums are short beside what they sum up.

    Args:
        ntp_weight, row_weight, nll, tcl, het, lse: ``[R]`` fp32, contiguous; see `ntpseg.losses.backends`. R may be 0.
        entry_weight: 0-dim fp32.
        tcl_weight, het_weight, z_loss: see `ntpseg.losses.LossOptions`.

    Returns:
        The loss, 0-dim, and its parts ``[5]`` in the order of `ntpseg.losses.options.LossParts`, both fp32.
    """
    loss = torch.empty((), dtype=torch.float32, device=nll.device)
    parts = torch.empty(5, dtype=torch.float32, device=nll.device)
    loss_terms_kernel[(1,)](
        ntp_weight,
        row_weight,
        nll,
        tcl,
        het,
        lse,
        entry_weight,
        loss,
        parts,
        nll.shape[0],
        float(tcl_weight),
        float(het_weight),
        float(z_loss),
        BLOCK_SIZE=16384 if INTERPRETED else 2048,
        num_warps=16,
    )
    return loss, parts
