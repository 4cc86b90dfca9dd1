"""The planned memory of real training steps, against what PyTorch's allocator gave out in them."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.plan_memory import GOAL, Blocks, Case, compare

deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["one", pytest.param("zero2", marks=deepspeed)])
def test_plan_is_within_the_goal(sharding: str) -> None:
    row = compare(Case("tiny", sharding, 2, size=64))
    assert abs(row["error"]) <= GOAL, row
    for phase in ("forward", "step"):
        assert row["predicted_phases"][phase] == pytest.approx(row["measured_phases"][phase], rel=0.15), phase


def test_blocks_whose_free_was_not_seen_end_where_others_begin() -> None:
    blocks = Blocks()
    for address, size in ((100, 50), (200, 50), (300, 50)):
        blocks.change(address, size)
    assert blocks.bytes == 150
    blocks.change(200, -50)
    assert blocks.bytes == 100
    # It begins within the first and ends within the third.
    blocks.change(140, 170)
    assert blocks.bytes == 170
    blocks.change(999, -10)
    assert blocks.bytes == 170
    blocks.change(140, -170)
    assert blocks.bytes == 0
