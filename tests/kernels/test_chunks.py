"""Chunk sizes from the byte budget."""

from __future__ import annotations

import pytest
import torch

from ntpseg.kernels.chunks import LEAST_ROWS, WORKSPACE_BYTES, bytes_per_row, plan_chunks

BF16 = torch.bfloat16


@pytest.mark.parametrize("width", [1024, 2048, 4096])
@pytest.mark.parametrize("classes", [4096, 32768, 184622])
@pytest.mark.parametrize("rows", [1, 300, 6272, 32768, 200_000])
def test_plan(rows: int, classes: int, width: int) -> None:
    plan = plan_chunks(rows, classes, width, BF16, fused=True, block_classes=256, weight_grad=True)
    assert plan.rows * (plan.count - 1) < rows <= plan.rows * plan.count
    assert plan.stride >= classes and plan.stride % 64 == 0
    if plan.count > 1:
        assert plan.rows >= LEAST_ROWS
        # the last chunk is no sliver
        assert rows - plan.rows * (plan.count - 1) > plan.rows - 128 * plan.count
    each = bytes_per_row(classes, width, BF16, fused=True, block_classes=256)
    total = 4 * classes * width
    if plan.rows * each + (total if plan.count > 1 else 0) > WORKSPACE_BYTES:
        # only where the least number of rows does not fit beside the sum, and then without waste
        assert LEAST_ROWS * each + total > WORKSPACE_BYTES
        if plan.count > 1:
            assert plan.rows <= max(LEAST_ROWS, WORKSPACE_BYTES // each)
        else:
            assert rows * each <= 1.25 * (max(LEAST_ROWS, WORKSPACE_BYTES // each) * each + total)


def test_issue_shapes() -> None:
    """What docs/kernels.md states."""
    plan = plan_chunks(6272, 32768, 4096, BF16, fused=True, block_classes=256, weight_grad=True)
    assert plan.count == 1
    plan = plan_chunks(32768, 32768, 4096, BF16, fused=True, block_classes=256, weight_grad=True)
    assert (plan.rows, plan.count) == (5504, 6)
    plan = plan_chunks(6272, 184622, 4096, BF16, fused=True, block_classes=256, weight_grad=True)
    assert (plan.rows, plan.count) == (6272, 1)  # 2.3 GiB; in chunks the fp32 sum alone is 2.8 GiB
    plan = plan_chunks(6272, 184622, 1024, BF16, fused=True, block_classes=256, weight_grad=True)
    assert (plan.rows, plan.count) == (2176, 3)


def test_own_budget() -> None:
    plan = plan_chunks(
        100, 1000, 64, torch.float32, fused=False, block_classes=512, weight_grad=True, chunk_bytes=1024 * 4 * 30
    )
    assert (plan.rows, plan.count, plan.stride) == (25, 4, 1024)
    assert plan_chunks(5, 1000, 64, BF16, fused=True, block_classes=256, weight_grad=True, chunk_bytes=1).rows == 1
