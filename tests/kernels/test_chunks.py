"""Chunk sizes from the byte budget."""

from __future__ import annotations

import pytest
import torch

from ntpseg.kernels.chunks import (
    FAST_WORKSPACE_BYTES,
    MAX_SUM_SHARE,
    MIN_ROWS,
    MIN_ROWS_SPLIT,
    WORKSPACE_BYTES,
    Chunks,
    accumulator_bytes,
    bytes_per_row,
    plan_chunks,
    sum_share,
    workspace_bytes,
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


def _fast(rows: int, classes: int, width: int) -> Chunks:
    return plan_chunks(rows, classes, width, BF16, **FUSED, needs_accumulator=True, workspace="fast")


@pytest.mark.parametrize(
    ("classes", "width", "small", "small_bytes", "fast", "fast_bytes"),
    [
        (32768, 1024, Chunks(11008, 3), 940_179_456, Chunks(32768, 1), 2_399_141_888),
        (32768, 2048, Chunks(8192, 4), 918_552_576, Chunks(32768, 1), 2_600_468_480),
        (32768, 4096, Chunks(5504, 6), 1_041_301_504, Chunks(32768, 1), 3_003_121_664),
        (184622, 1024, Chunks(2048, 16, True), 1_009_219_584, Chunks(11008, 3, True), 4_450_648_064),
        (184622, 2048, Chunks(1664, 20, True), 1_061_006_336, Chunks(11008, 3, True), 4_707_334_144),
        (184622, 4096, Chunks(2048, 16, True), 1_614_127_104, Chunks(11008, 3, True), 5_220_706_304),
    ],
)
def test_workspaces_to_the_byte(
    classes: int, width: int, small: Chunks, small_bytes: int, fast: Chunks, fast_bytes: int
) -> None:
    rows = 32768
    assert (_plan(rows, classes, width), _fast(rows, classes, width)) == (small, fast)
    for plan, expected in ((small, small_bytes), (fast, fast_bytes)):
        # E and 12 bytes of statistics per block of 256 classes, fp32 dH and scaled H; then the sum of dW
        row = 2 * (classes + -classes % 64) + 12 * -(-classes // 256) + 6 * width
        total = {(1, False): 0, (3, False): 4, (4, False): 4, (6, False): 4}.get((plan.count, plan.split_accumulator))
        sum_of = classes * width + (32 << 20) if total is None else total * classes * width
        assert workspace_bytes(plan, classes, width, BF16, **FUSED, needs_accumulator=True) == expected
        assert expected == plan.rows * row + sum_of
    assert sum_share(fast, rows, 2) <= MAX_SUM_SHARE < sum_share(small, rows, 2)
    assert fast_bytes <= FAST_WORKSPACE_BYTES


@pytest.mark.parametrize("width", [64, 1024, 4096])
@pytest.mark.parametrize("classes", [300, 32768, 184622])
@pytest.mark.parametrize("rows", [1, 300, 6272, 33_001, 200_000])
@pytest.mark.parametrize("accumulator", [True, False])
def test_fast_is_never_slower_than_small(rows: int, classes: int, width: int, accumulator: bool) -> None:
    how = {**FUSED, "needs_accumulator": accumulator}
    small = plan_chunks(rows, classes, width, BF16, **how)
    fast = plan_chunks(rows, classes, width, BF16, **how, workspace="fast")
    assert fast.rows * (fast.count - 1) < rows <= fast.rows * fast.count
    shares = [sum_share(plan, rows, 2, needs_accumulator=accumulator) for plan in (small, fast)]
    assert shares[1] <= shares[0] and fast.rows >= small.rows
    used = workspace_bytes(fast, classes, width, BF16, **how)
    if fast != small:
        assert used <= FAST_WORKSPACE_BYTES
        # within it no fewer rows would do, unless the bytes are what stops it
        one_more = fast.rows + 128 * fast.count
        assert shares[1] <= MAX_SUM_SHARE or one_more * used / fast.rows > FAST_WORKSPACE_BYTES


def test_one_chunk_is_the_same_with_either() -> None:
    for width in (1024, 2048, 4096):
        assert _fast(6272, 32768, width) == _plan(6272, 32768, width) == Chunks(6272, 1)


def test_more_than_fast_has_room_for() -> None:
    plan = _fast(200_000, 400_000, 4096)
    assert plan.split_accumulator and plan.rows > _plan(200_000, 400_000, 4096).rows
    used = workspace_bytes(plan, 400_000, 4096, BF16, **FUSED, needs_accumulator=True)
    assert used <= FAST_WORKSPACE_BYTES and sum_share(plan, 200_000, 2) > MAX_SUM_SHARE


def test_an_own_budget_overrides_the_workspace() -> None:
    how = {**FUSED, "needs_accumulator": True, "chunk_bytes": 1 << 29}
    assert plan_chunks(32768, 32768, 1024, BF16, **how, workspace="fast") == plan_chunks(
        32768, 32768, 1024, BF16, **how
    )
