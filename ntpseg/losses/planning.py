"""The plan of one batch: which rows, and how their results return; by kernels on a GPU, in plain PyTorch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ntpseg.losses.options import LossOptions
from ntpseg.losses.placement import RowPlan
from ntpseg.losses.rows import plan_rows


def plan_batch(hidden: Tensor, labels: Tensor, classes: int, options: LossOptions, **keywords: Any) -> Any:
    """See `ntpseg.losses.rows.plan_rows` for the arguments and errors.

    Returns:
        A `RowPlan`, or a `ntpseg.losses.rows_by_kernels.KernelPlan`, which offers the same.
    """
    if options.backend == "triton" and hidden.dtype != torch.float64 and labels.numel():
        from ntpseg.kernels.dialect import INTERPRETED
        from ntpseg.losses.rows_by_kernels import plan_by_kernels

        if hidden.is_cuda or INTERPRETED:
            return plan_by_kernels(hidden, labels, classes, options, **keywords)
    rows, ntp_share = plan_rows(hidden, labels, classes, options, **keywords)
    batch, time, heads, _ = hidden.shape
    return RowPlan(rows, ntp_share, (batch, time, heads), int(options.shift))
