"""Gradient filtering: what it drops, what it never drops, and its error bound."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import DESCRIPTORS, distance, draw_rows, run, truth

from ntpseg.kernels.chunk_loop import LoopOptions
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, ArchConfigs
from ntpseg.kernels.gradient_filter import BlockMask, create_block_mask, filtered_d_hidden, filtered_d_weight
from ntpseg.kernels.tl_utils import INTERPRETED
from ntpseg.kernels.workspace import BlockStats, RowStats
from ntpseg.losses.compaction import Rows
from ntpseg.losses.options import LossOptions

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")

THRESHOLD = 2.0**-12


def _idle_vocabulary(dtype: torch.dtype, classes: int = 1100) -> tuple[Rows, torch.Tensor]:
    """As after training on masks: the model is sure of a few codes, the bulk of the vocabulary is idle."""
    rows, weight = draw_rows(count=130, width=64, classes=classes, dtype=dtype)
    used = torch.arange(5, 60, 7)
    target = used[torch.arange(130) % len(used)]
    weight = weight * 0.01
    weight[used, :8] = torch.eye(8).to(dtype) * 3
    hidden = rows.hidden * 0.1
    hidden[:, :8] += torch.nn.functional.one_hot(torch.arange(130) % len(used), 8).to(dtype) * 5
    hard_tokens = torch.where(rows.hard_tokens < 0, -1, rows.hard_tokens % 100)
    hard_tokens = torch.where(hard_tokens == target.unsqueeze(1), -1, hard_tokens)
    hard_tokens[::5, 0] = classes - 1  # in a tile that is otherwise skipped
    return dataclasses.replace(rows, hidden=hidden.to(dtype), target=target, hard_tokens=hard_tokens), weight.to(dtype)


def test_active_tiles_are_the_probable_and_the_contrasted() -> None:
    classes = 700
    z = torch.full((130, classes), -20.0)
    z[:, 3] = 0.0
    z[64:, 600] = -5.0  # e**-5 > 2**-12: alive in the second and third row block
    target = torch.full((130,), 3)
    target[129] = -1  # padding keeps nothing alive
    z[129, 300] = 50.0
    blocks = z.split(128, 1)
    block_stats = BlockStats(torch.empty(6, 130), torch.stack([b.amax(1) for b in blocks]), torch.empty(6, 130).int())
    row_stats = RowStats.empty(130, torch.device("cpu"))
    target_logit = z[:, 3].clone()
    row_stats.nll.copy_(z.logsumexp(1) - target_logit)
    token = torch.full((130, 2), -1, dtype=torch.int32)
    token[70, 1] = 512
    result = create_block_mask(block_stats, row_stats, target_logit, target, token, THRESHOLD, 64, 128, target)
    assert result.active.tolist() == [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0]]
    assert result.class_num_blocks.tolist() == [1, 2, 2] and result.class_indices[1, :2].tolist() == [0, 4]
    assert result.row_num_blocks.tolist() == [3, 0, 0, 0, 2, 0] and result.row_indices[4, :2].tolist() == [1, 2]


@pytest.mark.parametrize("configs", [GEMM_CONFIGS["interpreter"], DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_over_active_tiles(configs: ArchConfigs, dtype: torch.dtype) -> None:
    rows, classes, width = 150, 330, 72
    e = torch.randn(rows, 384).to(dtype)[:, :classes]
    weight, scaled, scale = torch.randn(classes, width).to(dtype), torch.randn(rows, width).to(dtype), torch.randn(rows)
    active = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 0]]).int()
    indices, num_blocks = torch.tensor([[0, 2, 9], [9, 9, 9], [0, 9, 9]]).int(), torch.tensor([2, 0, 1]).int()
    block_mask = BlockMask(64, 128, active, num_blocks, indices, num_blocks, indices)
    mask = active.repeat_interleave(64, 0)[:rows].repeat_interleave(128, 1)[:, :classes]
    kept = e.double() * mask
    result = torch.empty(rows, width)
    filtered_d_hidden(e, weight, scale, result, block_mask, configs.d_hidden)
    assert distance(result, (kept @ weight.double()) * scale.double().unsqueeze(1)) < 1e-6
    index = torch.randperm(200)[:rows]
    index[3] = -1
    placed = torch.full((200, width), 5.0)
    filtered_d_hidden(e, weight, scale, placed, block_mask, configs.d_hidden, index)
    there = torch.full((200, width), 5.0)
    there[index[index >= 0]] = result[index >= 0]
    assert torch.equal(placed, there)
    total = torch.empty(classes, width)
    filtered_d_weight(e, scaled, total, block_mask, configs.d_weight, accumulate=False)
    expected = kept.t() @ scaled.double()
    assert distance(total, expected) < 1e-6
    assert not total[128:256].any()
    filtered_d_weight(e, scaled, total, block_mask, configs.d_weight, accumulate=True)
    assert distance(total, 2 * expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [None, 1152 * 2 * 64])
def test_error_stays_within_its_bound(dtype: torch.dtype, chunk_bytes: int | None) -> None:
    rows, weight = _idle_vocabulary(dtype)
    expected = truth(rows, weight, LossOptions())
    loop = LoopOptions(fused=True, gradient_filter=THRESHOLD, chunk_bytes=chunk_bytes)
    result = run(rows, weight, LossOptions(), loop)
    # logits are about 15 here: one unit in the last place of fp32 is 1e-6
    torch.testing.assert_close(result.nll.double(), expected.nll, rtol=1e-5, atol=2e-6)

    # per row: what is dropped is below the threshold class by class, and weighs row_weight * p
    p = (rows.hidden.double() @ weight.double().t()).softmax(1)
    dropped = torch.where(p < THRESHOLD, p, 0.0)
    lost = rows.row_weight.double().unsqueeze(1) * dropped
    exact = run(rows, weight, LossOptions(), LoopOptions(fused=True, chunk_bytes=chunk_bytes))
    for name, bound in (
        ("d_hidden", lost @ weight.double().abs()),
        ("d_weight", lost.t() @ rows.hidden.double().abs()),
    ):
        ours, whole = getattr(result, name).double(), getattr(exact, name).double()
        rounding = (4e-6 if dtype == torch.float32 else 1.5e-2) * whole.abs()
        slack = 1e-6 * whole.abs().amax()
        assert ((ours - whole).abs() <= bound + rounding + slack).all(), name
        assert not torch.equal(ours, whole)


def test_it_is_off_by_default_and_does_skip_when_on() -> None:
    rows, weight = _idle_vocabulary(torch.float32)
    exact = run(rows, weight, LossOptions())
    # every row is nearly sure, so p_y - 1 is what fp32 leaves of 1 - 0.9997
    assert distance(exact.d_weight, truth(rows, weight, LossOptions()).d_weight) < 1e-3
    filtered = run(rows, weight, LossOptions(), LoopOptions(fused=True, gradient_filter=THRESHOLD))
    # classes whose gradient was small but not zero, and now is not computed at all
    skipped = (filtered.d_weight == 0).all(1) & (exact.d_weight != 0).any(1)
    assert skipped.float().mean() > 0.5


def test_the_option_reaches_the_kernels() -> None:
    rows, weight = _idle_vocabulary(torch.bfloat16)
    exact = run(rows, weight, LossOptions())
    filtered = run(rows, weight, LossOptions(gradient_filter=0.5))
    assert not torch.equal(exact.d_weight, filtered.d_weight)
    assert torch.equal(exact.nll, filtered.nll)
