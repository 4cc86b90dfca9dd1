"""Each kernel alone against the line of PyTorch that its file quotes as reference."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import DESCRIPTORS, distance, draw_rows

from ntpseg.kernels import matmul as products
from ntpseg.kernels import weight_grad
from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.chunks import Chunks
from ntpseg.kernels.contrastive import contrastive, contrastive_tokens
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, GemmConfig
from ntpseg.kernels.indexed_dot import indexed_dot
from ntpseg.kernels.logits_epilogue import LOGITS_BLOCK_N, logits_exp, logits_stats
from ntpseg.kernels.matmul import addmm_, matmul
from ntpseg.kernels.row_reduce import overflow_gap, recompute_blocks, row_reduce
from ntpseg.kernels.scale_rows import scale_, scale_rows
from ntpseg.kernels.tl_utils import INTERPRETED
from ntpseg.kernels.weight_grad import WeightGrad, split_accumulate
from ntpseg.kernels.workspace import Anchors, BlockStats, LossWeights, RowStats

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")

LOG2E = 1 / math.log(2)
POINTERS = GEMM_CONFIGS["interpreter"].forward


def _anchors(logit: torch.Tensor, gap: float = 48.0) -> Anchors:
    return Anchors(logit, logit * LOG2E, logit + gap)


@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS.forward], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [333, 256], ids=["ragged", "whole-blocks"])
def test_product_with_epilogue(config: GemmConfig, dtype: torch.dtype, classes: int) -> None:
    rows, width = 100, 72
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(classes, width).to(dtype)
    z = hidden.float() @ weight.float().t()
    anchors = _anchors(z[:, 7].clone())
    blocks = -(-classes // config.BLOCK_N)
    block_stats = BlockStats.empty(blocks, rows, torch.device("cpu"))
    e = torch.full((rows, -(-classes // 128) * 128), math.nan, dtype=dtype)
    anchored_gemm(hidden, weight, e, anchors, block_stats, None, None, config, 2)

    expected = torch.exp(z.double() - z[:, 7:8].double())
    assert distance(e[:, :classes], expected) < (1e-5 if dtype == torch.float32 else 2.5e-3)
    assert not e[:, classes:].any()  # zeros, never garbage, up to the padded length
    for block in range(blocks):
        cut = slice(block * config.BLOCK_N, (block + 1) * config.BLOCK_N)
        assert distance(block_stats.row_sum[block], expected[:, cut].sum(1)) < 1e-5
        torch.testing.assert_close(block_stats.row_max[block], z[:, cut].amax(1))
        assert torch.equal(block_stats.argmax[block].long(), z[:, cut].argmax(1) + cut.start)


def test_only_the_listed_row_blocks_are_written() -> None:
    hidden, weight = torch.randn(150, 16), torch.randn(100, 16)
    z = hidden @ weight.t()
    block_stats = BlockStats.empty(1, 150, torch.device("cpu"))
    for block in range(3):
        e = torch.full((150, 128), -5.0)
        chosen = torch.tensor([block, 77, 77], dtype=torch.int32)  # what lies behind the count is not read
        anchored_gemm(hidden, weight, e, _anchors(z[:, 0]), block_stats, chosen, torch.tensor(1).int(), POINTERS, 2)
        done = torch.zeros(150, dtype=torch.bool)
        done[block * 64 : block * 64 + 64] = True
        assert (e[~done] == -5).all() and (e[done] >= 0).all()
    e = torch.full((150, 128), -5.0)
    anchored_gemm(hidden, weight, e, _anchors(z[:, 0]), block_stats, chosen, torch.tensor(0).int(), POINTERS, 2)
    assert (e == -5).all()
    # without a list the first row blocks, as many as the device says
    anchored_gemm(hidden, weight, e, _anchors(z[:, 0]), block_stats, None, torch.tensor(2).int(), POINTERS, 2)
    assert (e[:128] >= 0).all() and (e[128:] == -5).all()


def test_statistics_survive_an_overflow_of_the_anchor() -> None:
    hidden, weight = torch.randn(40, 64) * 12, torch.randn(300, 64)
    z = hidden.double() @ weight.double().t()
    target = z.argmin(1)
    logit = z.gather(1, target.unsqueeze(1)).squeeze(1).float()
    anchors = _anchors(logit)
    assert (z.amax(1) - logit > 200).all()
    block_stats = BlockStats.empty(3, 40, torch.device("cpu"))
    e = torch.empty(40, 320)
    anchored_gemm(hidden, weight, e, anchors, block_stats, None, None, POINTERS, 1)
    assert e.isfinite().all() and block_stats.row_sum.isfinite().all()

    row_stats = RowStats.empty(40, torch.device("cpu"))
    factors = LossWeights(torch.ones(40), torch.ones(()), 1.0, 1.0, 0.0, 1.0)
    none = torch.empty(40, 0, dtype=torch.int64)
    row_reduce(block_stats, anchors, row_stats, target, none, factors, 300, torch.float32)
    assert distance(row_stats.nll, z.logsumexp(1) - z.amin(1)) < 1e-6
    assert distance(row_stats.margin, z.amax(1) - z.amin(1)) < 1e-6
    assert row_stats.recompute.all()
    # the new anchor makes E the softmax itself
    torch.testing.assert_close(anchors.anchor, (z.logsumexp(1) * LOG2E).float())
    torch.testing.assert_close(row_stats.scale, torch.ones(40), rtol=1e-4, atol=0)


def test_a_split_accumulator() -> None:
    parts = [torch.randn(70, 30) * 10.0 ** torch.randint(-8, 8, (70, 30)) for _ in range(6)]
    parts[2][0, 0], parts[3][0, 1], parts[4][0, 2], parts[4][0, 3] = math.nan, math.inf, -math.inf, -3.38e38
    total, low = torch.empty(70, 30, dtype=torch.bfloat16), torch.empty(70, 30, dtype=torch.uint8)
    for i, part in enumerate(parts):
        split_accumulate(part, total, low, first=i == 0, last=False)
    expected = sum(part.double() for part in parts)
    kept = total.float().view(torch.int32) | low.int() << 8
    finite = expected.isfinite()
    error = (kept.view(torch.float32).double() - expected).abs()[finite]
    # each of the six roundings is half of the 17th bit of what was there, which was at most the sum of the sizes
    assert (error <= 6 * 2.0**-17 * sum(part.double().abs() for part in parts)[finite]).all()
    assert total[0, 0].isnan() and total[0, 1] == math.inf and total[0, 2] == -math.inf

    exact = parts[0]
    split_accumulate(exact, total, low, first=True, last=True)
    assert torch.equal(total, exact.bfloat16())
    split_accumulate(exact, total, low, first=True, last=False)
    split_accumulate(torch.zeros_like(exact), total, low, first=False, last=True)
    assert distance(total, exact.double()) <= 1.001 * distance(exact.bfloat16(), exact.double())


@pytest.mark.parametrize("width", [1536, 2560, 3072])
def test_slices_of_the_weight_gradient_start_on_16_bytes(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise cuBLAS takes kernels for unaligned operands: right, and slow."""
    whole = torch.empty(151936, width, dtype=torch.bfloat16, device="meta")
    assert all(cut.start % 8 == 0 for cut in products.row_slices(whole))

    monkeypatch.setattr(products, "SLICE_BYTES", 4 * width * 85)
    out = torch.empty(300, width, dtype=torch.bfloat16)
    e, scaled = torch.randn(4, 320).bfloat16()[:, :300], torch.randn(4, width).bfloat16()
    addresses = []

    def recorded(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        addresses.append(left.data_ptr() - e.data_ptr())
        return matmul(left, right, out)

    for module in (products, weight_grad):
        monkeypatch.setattr(module, "matmul", recorded)
    factors = LossWeights(torch.ones(4), torch.ones(()), 1.0, 1.0, 0.0, 1.0)
    chunks = Chunks(4, 2, split_accumulator=True)
    accumulator = WeightGrad(out, torch.bfloat16, chunks, factors, GEMM_CONFIGS["interpreter"])
    for _ in range(chunks.count):
        accumulator.add(e, scaled, None)
    assert len(addresses) == 2 * 5 and len(set(addresses)) == 5
    assert distance(out, 2 * e.double().t() @ scaled.double()) < 2.5e-3
    addmm_(torch.zeros(300, width), e.t(), scaled)  # as where PyTorch adds no 16-bit product to an fp32 matrix
    assert len(addresses) == 3 * 5 and not any(address % 16 for address in addresses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_by_a_device_scalar(dtype: torch.dtype) -> None:
    value = torch.randn(300, 7).to(dtype)
    for factor in (1.0, 1 / 3, 0.0, -2.5, math.nan):
        result = scale_(value.clone(), torch.tensor(factor))
        torch.testing.assert_close(result, (value.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_recompute_blocks_holds_the_blocks_in_order() -> None:
    recompute = torch.zeros(2500, dtype=torch.int32)
    assert recompute_blocks(recompute, 64)[1] == 0
    recompute[[3, 70, 71, 2499]] = 1
    result, count = recompute_blocks(recompute, 64)
    assert result[: int(count)].tolist() == [0, 1, 39]


@pytest.mark.parametrize("columns", [1, 3, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_logits(dtype: torch.dtype, columns: int) -> None:
    hidden, weight = torch.randn(300, 150).to(dtype), torch.randn(90, 150).to(dtype)
    token = torch.randint(-1, 90, (300, columns))
    token[2] = -1
    expected = (hidden.double().unsqueeze(1) * weight.double()[token.clamp_min(0)]).sum(-1).masked_fill(token < 0, 0)
    assert distance(indexed_dot(hidden, weight, token), expected) < 1e-6
    assert indexed_dot(hidden, weight, token[:, :0]).shape == (300, 0)
    hidden[2:4], token[3, 0] = math.nan, -1
    poisoned = indexed_dot(hidden, weight, token)
    assert not poisoned[2].any() and torch.equal(poisoned[3].isnan(), token[3] >= 0)


def test_contrastive_tokens() -> None:
    prediction = torch.tensor([4, 5, 6, -1, 8])
    target = torch.tensor([0, 4, 2, 3, -1])
    num_negatives = torch.tensor([0, 1, 2, 1, 3], dtype=torch.int32)
    hard = torch.tensor([[9], [-1], [7], [1], [2]])
    result = contrastive_tokens(prediction, target, num_negatives, hard, 1, 4, 2)
    # row 1: its negative equals its target; row 4 is padding
    assert result.tolist() == [[-1, -1, -1], [5, 4, 7], [6, -1, 1], [-1, -1, -1]]


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_contrastive_counts_every_occurrence(tau: float) -> None:
    count, classes, negatives = 30, 20, 5
    z = torch.randn(count, classes, dtype=torch.float64) * 4
    target = torch.randint(0, classes, (count,))
    token = torch.randint(-1, 4, (count, negatives + 3)).int()  # few tokens: many duplicates, also across kinds
    token[token == target.unsqueeze(1)] = -1
    row_weight, entry_weight = torch.rand(count), torch.tensor(0.4)
    leaf = z.clone().requires_grad_()
    z_y = leaf.gather(1, target.unsqueeze(1))
    gap = (leaf.gather(1, token.long().clamp_min(0)) - z_y) / tau
    gap = gap.masked_fill(token < 0, -math.inf)
    tcl = torch.cat([gap[:, :negatives], torch.zeros(count, 1)], 1).logsumexp(1)
    het = torch.nn.functional.softplus(gap[:, negatives:], threshold=1e4).sum(1)
    nll = leaf.logsumexp(1) - z_y.squeeze(1)
    (row_weight * (nll + 0.7 * tcl) + 1.3 * entry_weight * het).sum().backward()

    p = z.softmax(1)
    e = p.float().clone()
    logit = z.gather(1, target.unsqueeze(1)).squeeze(1).float()
    row_stats = RowStats.empty(count, torch.device("cpu"))
    row_stats.nll.copy_(nll.detach())
    row_stats.lse.copy_(leaf.detach().logsumexp(1))
    row_stats.scale.copy_(row_weight)
    gaps = z.gather(1, token.long().clamp_min(0)).float()
    found_tcl, found_het = torch.empty(2, count)
    factors = LossWeights(row_weight, entry_weight, 0.7, 1.3, 0.0, tau)
    contrastive(e, token, gaps, logit, target, row_stats, factors, negatives, found_tcl, found_het)
    assert distance(found_tcl, tcl.detach()) < 1e-6
    assert distance(found_het, het.detach()) < 1e-6
    assert distance(e * row_weight.unsqueeze(1), leaf.grad) < 1e-6


def test_contrastive_reaches_beyond_32_bit_offsets() -> None:
    stride = 1 << 25  # 70 rows of it are 4.7 GB of address space, of which only the touched pages exist
    e = torch.empty(70, stride, dtype=torch.bfloat16)
    target = torch.full((70,), stride - 3)
    row_stats = RowStats.empty(70, torch.device("cpu"))
    row_stats.nll.fill_(math.log(2))
    row_stats.lse.fill_(1.0)
    row_stats.scale.fill_(1.0)
    token = torch.full((70, 1), stride - 5, dtype=torch.int32)
    factors = LossWeights(torch.ones(70), torch.ones(()), 1.0, 1.0, 0.0, 1.0)
    terms = torch.empty(2, 70)
    contrastive(e, token, torch.zeros(70, 1), torch.zeros(70), target, row_stats, factors, 1, terms[0], terms[1])
    # p = 1/2 for both tokens, and the negative takes half of TCL from the target
    assert (e[:, stride - 5] == 1.0).all() and (e[:, stride - 3] == -1.0).all()


def test_contrastive_keeps_small_numbers() -> None:
    nll = torch.tensor([1e-9, 3e-7, 1e-3, 0.05, 0.07, 20.0])
    count = len(nll)
    row_stats = RowStats.empty(count, torch.device("cpu"))
    row_stats.nll.copy_(nll)
    row_stats.lse.copy_(nll)
    row_stats.scale.fill_(1.0)
    e = torch.zeros(count, 8)
    factors = LossWeights(torch.ones(count), torch.zeros(()), 1.0, 1.0, 0.0, 1.0)
    token = torch.full((count, 1), 2, dtype=torch.int32)
    gap = torch.full((count, 1), -25.0)
    terms = torch.empty(2, count)
    target = torch.zeros(count, dtype=torch.int64)
    contrastive(e, token, gap, torch.zeros(count), target, row_stats, factors, 1, terms[0], terms[1])
    pull = torch.tensor(-25.0).double().exp()
    torch.testing.assert_close(e[:, 0].double(), torch.expm1(-nll.double()) - pull, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms[0].double(), torch.log1p(pull).expand(count), rtol=1e-6, atol=0)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_scaled_rows(out_dtype: torch.dtype) -> None:
    source = torch.randn(33, 1500)
    scale = torch.randn(33)
    source[4], scale[4] = math.nan, 0.0
    result = scale_rows(source, scale, torch.empty(33, 1500, dtype=out_dtype), 4.0)
    expected = (source * scale.unsqueeze(1) * 4.0).nan_to_num(0.0)
    expected[4] = 0
    assert torch.equal(result, expected.to(out_dtype))
    inplace = source.clone()
    assert torch.equal(scale_rows(inplace, scale, inplace, 4.0), expected)
    index = torch.randperm(50)[:33]
    index[7] = -1
    placed = scale_rows(source, scale, torch.full((50, 1500), 5.0, dtype=out_dtype), 4.0, index)
    there = torch.full((50, 1500), 5.0).to(out_dtype)
    kept = torch.arange(33) != 7
    there[index[kept]] = expected.to(out_dtype)[kept]
    assert torch.equal(placed, there)


def test_pass_over_written_logits() -> None:
    z = torch.randn(70, 1100) * 5
    anchors = _anchors(z[:, 3].clone())
    block_stats = BlockStats.empty(-(-1100 // LOGITS_BLOCK_N), 70, torch.device("cpu"))
    logits_stats(z, anchors, block_stats)
    expected = torch.exp(z.double() - z[:, 3:4].double())
    assert distance(block_stats.row_sum.double().sum(0), expected.sum(1)) < 1e-5
    torch.testing.assert_close(block_stats.row_max.amax(0), z.amax(1))
    narrow = torch.empty(70, 1104, dtype=torch.bfloat16)
    logits_exp(z, anchors, narrow)
    assert distance(narrow[:, :1100], expected) < 2.5e-3
    logits_exp(z, anchors, z)
    assert distance(z, expected) < 1e-5


def test_products_accumulate_in_fp32() -> None:
    left, right = torch.randn(300, 40).bfloat16(), torch.randn(40, 24).bfloat16()
    expected = left.double() @ right.double()
    out = matmul(left, right, torch.empty(300, 24))
    assert distance(out, expected) < 1e-6
    assert distance(addmm_(out, left, right), 2 * expected) < 1e-6
    assert distance(matmul(left, right, torch.empty(300, 24, dtype=torch.bfloat16)), expected) < 2.5e-3


def test_limits_of_e_leave_room_for_its_sum() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        # the sum over 2**18 classes, and one over it times a row_weight of 1e-6, both stay in the normal range
        assert math.exp(overflow_gap(dtype)) * 2**18 < 1e30
        assert 1e-6 / (math.exp(overflow_gap(dtype)) * 2**18) > torch.finfo(dtype).tiny
    assert math.exp(overflow_gap(torch.float16)) < torch.finfo(torch.float16).max


def test_float16_recomputes_rows_that_it_could_not_hold() -> None:
    rows, _ = draw_rows(count=20, classes=64)
    block_stats = BlockStats.empty(1, 20, torch.device("cpu"))
    logit = torch.zeros(20)
    block_stats.row_max.zero_()
    block_stats.argmax.zero_()
    block_stats.row_sum.fill_(100.0)
    block_stats.row_sum[0, :10] = 2.0
    none = torch.empty(20, 0, dtype=torch.int64)
    factors = LossWeights(torch.ones(20), torch.ones(()), 1.0, 1.0, 0.0, 1.0)
    for dtype, again in ((torch.float16, 10), (torch.bfloat16, 0)):
        row_stats = RowStats.empty(20, torch.device("cpu"))
        anchors = _anchors(logit.clone())
        row_reduce(block_stats, anchors, row_stats, rows.target, none, factors, 64, dtype)
        assert int(row_stats.recompute.sum()) == again
        if again:
            # E will sum to 2**3: uniform probabilities stay in float16's normal range
            torch.testing.assert_close(row_stats.scale[10:], torch.full((10,), 0.125), rtol=1e-5, atol=0)
