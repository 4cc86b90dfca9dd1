"""Chunk sizes from the byte budget."""

from __future__ import annotations

import pytest
import torch

from ntpseg.kernels.chunks import (
    MIN_ROWS,
    MIN_ROWS_SPLIT,
    WORKSPACE_BYTES,
    Chunks,
    accumulator_bytes,
    bytes_per_row,
    plan_chunks,
)

BF16 = torch.bfloat16
FUSED = {"fused": True, "BLOCK_N": 256}


def _plan(rows: int, classes: int, width: int) -> Chunks:
    return plan_chunks(rows, classes, width, BF16, **FUSED, needs_accumulator=True)


@pytest.mark.parametrize("width", [1024, 2048, 4096])
@pytest.mark.parametrize("classes", [4096, 32768, 184622])
@pytest.mark.parametrize("rows", [1, 300, 6272, 32768, 200_000])
def test_plan(rows: int, classes: int, width: int) -> None:
    plan = _plan(rows, classes, width)
    assert plan.rows * (plan.count - 1) < rows <= plan.rows * plan.count
    if plan.count > 1:
        assert plan.rows >= (MIN_ROWS_SPLIT if plan.split_accumulator else MIN_ROWS)
        # the last chunk is no sliver
        assert rows - plan.rows * (plan.count - 1) > plan.rows - 128 * plan.count
    row_bytes = bytes_per_row(classes, width, BF16, **FUSED)
    if plan.rows * row_bytes + accumulator_bytes(plan, classes, width) > WORKSPACE_BYTES:
        # only where the fewest rows do not fit with the split accumulator, and then without waste
        accumulator = accumulator_bytes(Chunks(MIN_ROWS, 2, split_accumulator=True), classes, width)
        assert MIN_ROWS_SPLIT * row_bytes + accumulator > WORKSPACE_BYTES
        if plan.count > 1:
            assert plan.split_accumulator and plan.rows <= MIN_ROWS
        else:
            assert rows * row_bytes <= 2 * (MIN_ROWS * row_bytes + accumulator)


@pytest.mark.parametrize(
    ("rows", "classes", "width", "expected", "mebibytes"),
    [
        (6272, 32768, 4096, Chunks(6272, 1), 548),
        (32768, 32768, 4096, Chunks(5504, 6), 993),
        (6272, 184622, 1024, Chunks(2176, 3, split_accumulator=True), 1009),
        (32768, 184622, 2048, Chunks(1664, 20, split_accumulator=True), 1012),
        (6272, 184622, 4096, Chunks(6272, 1), 2408),
        (32768, 184622, 4096, Chunks(2048, 16, split_accumulator=True), 1539),
    ],
)
def test_issue_shapes(rows: int, classes: int, width: int, expected: Chunks, mebibytes: int) -> None:
    """What docs/kernels.md states."""
    plan = _plan(rows, classes, width)
    assert plan == expected
    used = plan.rows * bytes_per_row(classes, width, BF16, **FUSED) + accumulator_bytes(plan, classes, width)
    assert round(used / 2**20) == mebibytes


def test_a_gradient_that_is_its_own_sum_needs_no_room() -> None:
    for dtype in (BF16, torch.float32):
        plan = plan_chunks(32768, 184622, 4096, dtype, **FUSED, needs_accumulator=False)
        assert not plan.split_accumulator and plan.rows >= MIN_ROWS


def test_own_budget() -> None:
    plan = plan_chunks(
        100, 1000, 64, torch.float32, fused=False, BLOCK_N=512, needs_accumulator=False, chunk_bytes=1024 * 4 * 30
    )
    assert plan == Chunks(25, 4)
    one = plan_chunks(5, 1000, 64, BF16, **FUSED, needs_accumulator=True, chunk_bytes=1)
    assert one == Chunks(1, 5)
    large = plan_chunks(6272, 184622, 4096, BF16, **FUSED, needs_accumulator=True, chunk_bytes=1 << 29)
    assert large.split_accumulator and large.rows < 1500
