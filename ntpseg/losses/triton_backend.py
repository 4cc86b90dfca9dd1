"""The loss on Triton kernels: the backend interface of `ntpseg.losses.backends` over `ntpseg.kernels`."""

from __future__ import annotations

import contextlib

import torch

from ntpseg.kernels.chunk_loop import LoopOptions, Segment, SegmentResult, run_segment
from ntpseg.kernels.gather_scatter import zero_missing_rows
from ntpseg.kernels.tl_utils import INTERPRETED
from ntpseg.kernels.workspace import LossWeights, RowStats
from ntpseg.losses import torch_backend
from ntpseg.losses.backends import RowsResult, gradient_dtype
from ntpseg.losses.compaction import Rows
from ntpseg.losses.options import LossOptions
from ntpseg.losses.vocab_parallel import Shard


def rows_loss(
    rows: Rows,
    weight: torch.Tensor,
    options: LossOptions,
    *,
    hidden_grad: bool,
    weight_grad: bool,
    shard: Shard | None = None,
    loop: LoopOptions | None = None,
) -> RowsResult:
    """See `ntpseg.losses.backends` for the contract; float64, which no tensor core knows, goes to the torch backend.

    Args:
        shard: which classes `weight` holds, where ranks share the vocabulary; None for all.
        loop: overrides how the kernels run (tests and benchmarks); None takes it from `options`.

    Raises:
        ValueError: the tensors are on a device that has no Triton kernels and this is not Triton's interpreter.
    """
    hidden = rows.hidden
    if hidden.dtype == torch.float64:
        return torch_backend.rows_loss(
            rows, weight, options, hidden_grad=hidden_grad, weight_grad=weight_grad, shard=shard
        )
    if not (hidden.is_cuda or INTERPRETED):
        raise ValueError(
            f"hidden must be on a CUDA device for backend 'triton', got {hidden.device}; "
            "set TRITON_INTERPRET=1 before the first import to run its kernels on the CPU"
        )
    loop = loop or LoopOptions(
        chunk_bytes=options.chunk_bytes, gradient_filter=options.gradient_filter, workspace=options.workspace
    )
    count = hidden.shape[0]
    device = hidden.device
    matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
    result_dtype = gradient_dtype(weight.dtype)

    row_stats = RowStats.empty(count, device)
    tcl, het = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(2))
    d_hidden_dtype = result_dtype if shard is None else torch.float32
    # ranks add up their parts of the rows that there are; alone, every row goes straight to its place in the batch
    index, inverse_index = (rows.gather_index, rows.inverse_index) if shard is None else (None, None)
    in_place = index is not None and inverse_index is not None
    shape = hidden.shape if inverse_index is None else (len(inverse_index), hidden.shape[1])
    d_hidden = torch.empty(shape, dtype=d_hidden_dtype, device=device) if hidden_grad else None
    d_weight = torch.empty(matrices.shape, dtype=result_dtype, device=device) if weight_grad else None
    with torch.cuda.device(device) if hidden.is_cuda else contextlib.nullcontext():
        if d_hidden is not None and inverse_index is not None:
            zero_missing_rows(d_hidden, inverse_index)
        for matrix, (start, stop) in enumerate(rows.segments):
            if start == stop:
                if d_weight is not None:
                    d_weight[matrix].zero_()
                continue
            cut = slice(start, stop)
            segment = Segment(
                hidden=hidden[cut],
                target=rows.target[cut],
                num_negatives=rows.num_negatives[cut],
                hard_tokens=rows.hard_tokens[cut].contiguous(),
                weights=LossWeights(
                    row_weight=rows.row_weight[cut],
                    entry_weight=rows.entry_weight.to(torch.float32),
                    tcl_weight=options.tcl_weight,
                    het_weight=options.het_weight,
                    z_loss=options.z_loss,
                    temperature=options.temperature,
                ),
                negatives=options.negatives,
                anchors=None if rows.anchors is None else rows.anchors[cut],
                forward=rows.forward,
            )
            result = SegmentResult(
                row_stats=row_stats[cut],
                tcl=tcl[cut],
                het=het[cut],
                d_hidden=None if d_hidden is None else d_hidden if in_place else d_hidden[cut],
                d_weight=None if d_weight is None else d_weight[matrix],
                d_hidden_index=index[cut] if index is not None else None,
            )
            run_segment(segment, matrices[matrix], result, loop, shard)
    if d_hidden is not None and shard is not None:
        d_hidden = shard.all_reduce_sum(d_hidden).to(result_dtype)
    if d_weight is not None:
        d_weight = d_weight.view(weight.shape)
    return RowsResult(
        prediction=row_stats.prediction,
        nll=row_stats.nll,
        margin=row_stats.margin,
        tcl=tcl,
        het=het,
        lse=row_stats.lse,
        d_hidden=d_hidden,
        d_weight=d_weight,
        in_place=in_place and hidden_grad,
    )
