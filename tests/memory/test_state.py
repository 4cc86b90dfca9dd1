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


def test_a_merged_state_holds_what_both_ranks_recorded() -> None:
    """As one memory that saw all: what two ranks recorded in a running epoch, read by one."""
    whole, ranks = HardTokenMemory(10, 6), [HardTokenMemory(10, 6) for _ in range(2)]
    for epoch in range(2):
        for rank, memory in enumerate(ranks):
            fill(memory, 10 * epoch + rank)
            fill(whole, 10 * epoch + rank)
        if not epoch:
            for memory in (*ranks, whole):
                memory.advance()
            # what `sync` leaves behind: all ranks serve the same
            for memory, other in (ranks, ranks[::-1]):
                memory.merge_state_dict(other.state_dict())
    one = HardTokenMemory(10, 6)
    one.load_state_dict(ranks[0].state_dict())
    assert not same_state(one, whole)
    one.merge_state_dict(ranks[1].state_dict())
    assert same_state(one, whole)
    one.merge_state_dict(ranks[1].state_dict())
    assert same_state(one, whole), "merging twice changes nothing"
    ranks[1].advance()
    with pytest.raises(ValueError, match="epoch must be 2 as in this memory, got 3"):
        one.merge_state_dict(ranks[1].state_dict())


def same_state(first: HardTokenMemory, second: HardTokenMemory) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[part][name], b[part][name]) for part in ("served", "recording") for name in a[part])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sample", 10, r"recording.sample must be in \[0, 10\), got .* 10"),
        ("sample", -1, r"recording.sample must be in \[0, 10\), got -1"),
        ("sample", 3, "recording.sample must hold each sample once"),
        ("count", 7, r"recording.count must be in \[0, 7\)"),
        ("count", 0, "recording must hold .* the sum of its counts"),
        ("position", -1, r"recording.position must be in \[0, 20\), got -1"),
        ("position", 20, r"recording.position must be in \[0, 20\)"),
        ("token", -2, r"recording.token must be in \[0, 5\)"),
        ("token", 5, r"recording.token must be in \[0, 5\)"),
        ("deviation", float("nan"), "recording.deviation must be numbers, got NaN"),
        ("epoch", 0, "epoch must be an integer from 1 on, got 0"),
        ("epoch", "2", "epoch must be an integer from 1 on, got '2'"),
        ("served", None, "served must hold sample"),
    ],
)
def test_contents_that_no_memory_can_hold_are_refused(field: str, value: object, message: str) -> None:
    memory = HardTokenMemory(10, 6)
    fill(memory, 0)
    memory.advance()
    fill(memory, 1)
    saved = memory.state_dict()
    other = HardTokenMemory(10, 6)
    other.load_state_dict(saved, vocab_size=5, length=20)
    if field in ("epoch", "served"):
        saved[field] = value
    else:
        saved["recording"][field][0 if value != 3 else slice(None)] = value
    for read in (other.load_state_dict, other.merge_state_dict):
        with pytest.raises(ValueError, match=message):
            read(saved, vocab_size=5, length=20)
    assert other.epoch == 2 and equal(memory, other), "the memory is unchanged"


def test_what_the_replaced_state_did_wrong_is_forgotten() -> None:
    memory = HardTokenMemory(10, 6)
    memory._largest_token.fill_(2**31)  # what a GPU has seen, and `advance` would say
    memory._control[0] = 1
    memory.load_state_dict(HardTokenMemory(10, 6).state_dict())
    memory.advance()
    assert memory.epoch == 2
