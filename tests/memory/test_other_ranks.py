"""Hard tokens of a checkpoint on another number of ranks: none is lost, and none comes twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from ntpseg import HardTokenMemory
from ntpseg.training.checkpoint import load_memory, save_memory

SAMPLES, N, BATCH = 24, 4, 2


def record(memory: HardTokenMemory, batch: int, epoch: int) -> None:
    generator = torch.Generator().manual_seed(100 * epoch + batch)
    prediction, labels = torch.randint(0, 3, (2, BATCH, 10), generator=generator)
    ids = torch.arange(BATCH * batch, BATCH * (batch + 1))
    memory.record(ids, prediction, labels, torch.rand(BATCH, 10, generator=generator))


def end_epoch(ranks: list[HardTokenMemory]) -> None:
    """What `sync` and `advance` do on ranks that are processes (`test_sync`)."""
    states = [memory.state_dict() for memory in ranks]
    for memory in ranks:
        for state in states:
            memory.merge_state_dict(state)
        memory.advance()


def entries(memory: HardTokenMemory, buffer: str) -> Counter[tuple[int, ...]]:
    state = memory.state_dict()[buffer]
    samples = state["sample"].repeat_interleave(state["count"])
    return Counter(zip(samples.tolist(), state["position"].tolist(), state["token"].tolist()))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 3), (1, 4)])
def test_a_change_in_the_middle_of_an_epoch(before: int, after: int, tmp_path: Path) -> None:
    batches, changed = SAMPLES // BATCH, 5  # batches of the second epoch that the first ranks still do
    single = HardTokenMemory(SAMPLES, N, key="data")
    ranks = [HardTokenMemory(SAMPLES, N, key="data") for _ in range(before)]
    for batch in range(batches):
        record(single, batch, 1)
        record(ranks[batch % before], batch, 1)
    single.advance()
    end_epoch(ranks)
    for batch in range(changed):
        record(single, batch, 2)
        record(ranks[batch % before], batch, 2)
    for rank, memory in enumerate(ranks):
        save_memory(memory, tmp_path, rank)
    now = [HardTokenMemory(SAMPLES, N, key="data") for _ in range(after)]
    for rank, memory in enumerate(now):
        load_memory(memory, tmp_path, rank, after)
        assert memory.epoch == 2 and entries(memory, "served") == entries(single, "served"), (
            "any rank serves any sample"
        )
    held = set().union(*(entries(memory, "recording") for memory in now))
    assert held == set(entries(single, "recording"))
    for batch in range(changed, batches):
        record(single, batch, 2)
        record(now[batch % after], batch, 2)
    single.advance()
    end_epoch(now)
    expected = single.state_dict()["served"]
    for memory in now:
        assert max(entries(memory, "served").values()) == 1
        served = memory.state_dict()["served"]
        assert all(torch.equal(served[name], value) for name, value in expected.items())


def test_memory_of_other_data_is_refused(tmp_path: Path) -> None:
    memory = HardTokenMemory(SAMPLES, N, key="data")
    record(memory, 0, 1)
    save_memory(memory, tmp_path, 0)
    with pytest.raises(ValueError, match=r"hard_tokens_0\.pt cannot be resumed from: the state's content key must be"):
        load_memory(HardTokenMemory(SAMPLES, N, key="other"), tmp_path, 1, 2)
