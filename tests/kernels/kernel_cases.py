"""Random rows for the kernels, and the truth in float64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ntpseg.kernels.chunk_loop import LoopOptions
from ntpseg.kernels.gemm_configs import ArchConfigs, GemmConfig
from ntpseg.losses import triton_backend
from ntpseg.losses.backends import RowsResult
from ntpseg.losses.compaction import Rows
from ntpseg.losses.options import LossOptions

# The interpreter's tiles once more, with tensor descriptors, parts and flattening as on sm_90.
_WITH_DESCRIPTORS = GemmConfig(64, 128, 64, num_warps=4, num_stages=1, TMA=True, FLATTEN=True)
_SUBTILED = dataclasses.replace(_WITH_DESCRIPTORS, EPILOGUE_SUBTILE=4)
DESCRIPTORS = ArchConfigs(_SUBTILED, _WITH_DESCRIPTORS, _WITH_DESCRIPTORS)

ROW_RESULTS = ("nll", "margin", "tcl", "het", "lse")
GRADIENTS = ("d_hidden", "d_weight")
# E, the scaled hidden rows and the result are each rounded once; relative, of the norm
GRADIENT_ERROR = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def draw_rows(
    count: int = 140,
    width: int = 72,
    classes: int = 333,
    *,
    negatives: int = 5,
    hard: int = 2,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    leaders: bool = False,
    zero_row_weight: bool = False,
    padding: int = 0,
    seed: int = 0,
) -> tuple[Rows, Tensor]:
    """Rows and a weight.

    Args:
        scale: of the hidden states; 12 makes gaps between logits that overflow an anchored exponential.
        leaders: every third target is what the model predicts, so that gaps of both kinds occur.
        zero_row_weight: every eleventh row has no weight in CE, though it may hold a hard token.
        padding: that many rows at the end do not exist.
    """
    make = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(count, width, generator=make) * scale).to(dtype)
    weight = (torch.randn(classes, width, generator=make) * 0.5).to(dtype)
    target = torch.randint(0, classes, (count,), generator=make)
    if leaders:
        target[::3] = (hidden[::3].double() @ weight.double().t()).argmax(1)
    row = torch.arange(count)
    num_negatives = torch.minimum(row, row % (negatives + 2)).clamp_max(negatives).to(torch.int32)
    hard_tokens = torch.randint(0, classes, (count, hard), generator=make)
    hard_tokens[torch.rand(count, hard, generator=make) < 0.5] = -1
    if hard > 1:
        hard_tokens[::9, 1] = hard_tokens[::9, 0]  # duplicates count once per occurrence
    hard_tokens = torch.where(hard_tokens == target.unsqueeze(1), -1, hard_tokens)
    row_weight = torch.rand(count, generator=make) / count
    if zero_row_weight:
        row_weight[::11] = 0
    if padding:
        target[-padding:], row_weight[-padding:], num_negatives[-padding:], hard_tokens[-padding:] = -1, 0, 0, -1
    return Rows(hidden, target, row_weight, num_negatives, hard_tokens, torch.tensor(0.07), ((0, count),), row), weight


def truth(rows: Rows, weight: Tensor, options: LossOptions) -> RowsResult:
    """The definition of a backend in float64 with plain autograd, without a filter."""
    hidden = rows.hidden.double().requires_grad_()
    matrix = weight.double().requires_grad_()
    z = hidden @ matrix.t()
    real = rows.target >= 0
    z_y = z.gather(1, rows.target.clamp_min(0).unsqueeze(1))
    lse = z.logsumexp(1)
    row_max, prediction = z.detach().max(1)

    back = torch.arange(1, options.negatives + 1)
    earlier = (torch.arange(len(z)).unsqueeze(1) - back).clamp_min(0)
    negative = torch.where(real, prediction, -1)[earlier]
    exists = (back <= rows.num_negatives.unsqueeze(1)) & (negative != rows.target.unsqueeze(1)) & (negative >= 0)
    gap = (z.gather(1, negative.clamp_min(0)) - z_y) / options.temperature
    gap = torch.cat([gap.masked_fill(~exists, -torch.inf), torch.zeros_like(z_y)], 1)
    tcl = torch.where(real, gap.logsumexp(1), 0.0)
    far = (z.gather(1, rows.hard_tokens.clamp_min(0)) - z_y) / options.temperature
    far = far.masked_fill((rows.hard_tokens < 0) | ~real.unsqueeze(1), -torch.inf)
    het = torch.logaddexp(far, torch.zeros_like(far)).sum(1)
    nll = torch.where(real, lse - z_y.squeeze(1), 0.0)

    row_weight = rows.row_weight.double()
    terms = nll + options.tcl_weight * tcl + options.z_loss * torch.where(real, lse, 0.0).square()
    ((row_weight * terms).sum() + options.het_weight * rows.entry_weight.double() * het.sum()).backward()
    return RowsResult(
        prediction=torch.where(real, prediction, -1),
        nll=nll.detach(),
        margin=torch.where(real, row_max - z_y.detach().squeeze(1), 0.0),
        tcl=tcl.detach(),
        het=het.detach(),
        lse=torch.where(real, lse, 0.0).detach(),
        d_hidden=hidden.grad,
        d_weight=matrix.grad,
    )


def run(rows: Rows, weight: Tensor, options: LossOptions, loop: LoopOptions | None = None) -> RowsResult:
    """The kernels."""
    return triton_backend.rows_loss(rows, weight, options, hidden_grad=True, weight_grad=True, loop=loop)


def distance(result: Tensor, expected: Tensor) -> float:
    """Relative, in the norm."""
    return float((result.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_agrees(result: RowsResult, expected: RowsResult, dtype: torch.dtype) -> None:
    """Row results to fp32 accuracy whatever the dtype, gradients to three roundings of it."""
    for name in ROW_RESULTS:
        assert distance(getattr(result, name), getattr(expected, name)) < 1e-6, name
    assert torch.equal(result.prediction, expected.prediction)
    for name in GRADIENTS:
        got = getattr(result, name)
        assert got.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert distance(got, getattr(expected, name)) < GRADIENT_ERROR[dtype], name
