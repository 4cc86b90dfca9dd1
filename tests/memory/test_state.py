"""Saving and restoring the memory."""

from __future__ import annotations

import io

import pytest
import torch

from ntpseg import HardTokenMemory


def fill(memory: HardTokenMemory, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        ids = torch.randint(0, memory.num_samples, (4,), generator=generator)
        prediction, labels = torch.randint(0, 5, (2, 4, 20), generator=generator)
        memory.record(ids, prediction, labels, torch.rand(4, 20, generator=generator))


def equal(first: HardTokenMemory, second: HardTokenMemory) -> bool:
    ids = torch.arange(first.num_samples)
    a, b = first.lookup(ids), second.lookup(ids)
    return torch.equal(a.position, b.position) and torch.equal(a.token, b.token)


def resumed(memory: HardTokenMemory, **options: object) -> HardTokenMemory:
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = HardTokenMemory(memory.num_samples, memory.n, **options)
    fill(other, 99)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def test_resuming_within_an_epoch_is_exact() -> None:
    memory = HardTokenMemory(10, 6)
    fill(memory, 0)
    memory.advance()
    fill(memory, 1)
    other = resumed(memory)
    assert other.epoch == memory.epoch == 2
    assert equal(memory, other)
    for each in (memory, other):
        fill(each, 2)
        each.advance()
    assert (memory.lookup(torch.arange(10)).position >= 0).any()
    assert equal(memory, other)


def test_a_fresh_memory_is_saved_too() -> None:
    other = resumed(HardTokenMemory(10, 6))
    other.advance()
    assert (other.lookup(torch.arange(10)).position == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 11}, "num_samples must be 11 as in this memory, got 10"),
        ({"n": 5}, "n must be 5 as in this memory, got 6"),
        ({"key": "other"}, "content key must be 'other', got 'mine'"),
        ({"deviation": "nll"}, "deviation must be 'nll' as in this memory, got 'margin'"),
    ],
)
def test_a_state_of_something_else_is_refused(options: dict[str, object], message: str) -> None:
    memory = HardTokenMemory(10, 6, key="mine")
    other = HardTokenMemory(**{"num_samples": 10, "n": 6, "key": "mine", **options})
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(memory.state_dict())


def test_another_format_or_version_is_refused() -> None:
    memory = HardTokenMemory(10, 6)
    with pytest.raises(ValueError, match="version must be 1 for this release of ntpseg, got 2"):
        memory.load_state_dict({**memory.state_dict(), "version": 2})
    with pytest.raises(ValueError, match="format"):
        memory.load_state_dict({"rows": torch.zeros(3)})
