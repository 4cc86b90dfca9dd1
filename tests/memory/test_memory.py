"""The memory against a dictionary of sorted lists."""

from __future__ import annotations

import hard_error_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_extension import native
from torch import Tensor

from ntpseg import HardTokenMemory, HardTokens

SAMPLES, LENGTH = 6, 9


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(0, SAMPLES, (size,), generator=generator)
    prediction = torch.randint(-1, 4, (size, LENGTH), generator=generator)
    labels = torch.randint(0, 4, (size, LENGTH), generator=generator)
    labels[torch.rand(size, LENGTH, generator=generator) < 0.2] = -100
    deviation = torch.randint(0, 4, (size, LENGTH), generator=generator).float()
    deviation[torch.rand(size, LENGTH, generator=generator) < 0.1] = draw(
        st.sampled_from([float("nan"), float("inf"), -float("inf")])
    )
    return ids, prediction, labels, deviation


def served(entries: dict[int, list[reference.Entry]], n: int) -> HardTokens:
    position = torch.full((SAMPLES, n), -1)
    token = torch.full((SAMPLES, n), -1)
    for sample, kept in entries.items():
        for slot, (_, p, e) in enumerate(reference.best(kept, n)):
            position[sample, slot], token[sample, slot] = p, e
    return HardTokens(position, token)


def expect(memory: HardTokenMemory, entries: dict[int, list[reference.Entry]]) -> None:
    result, expected = memory.lookup(torch.arange(SAMPLES)), served(entries, memory.n)
    assert result.position.dtype == result.token.dtype == torch.int64
    assert torch.equal(result.position, expected.position)
    assert torch.equal(result.token, expected.token)


@pytest.mark.parametrize("path", ["native", "plain"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(batches(), max_size=4), min_size=1, max_size=3), st.integers(1, 12))
def test_epochs_equal_the_definition(path: str, epochs: list[list[tuple[Tensor, ...]]], n: int) -> None:
    with native(path == "native"):
        follow(epochs, n)


def follow(epochs: list[list[tuple[Tensor, ...]]], n: int) -> None:
    memory = HardTokenMemory(SAMPLES, n)
    previous: dict[int, list[reference.Entry]] = {}
    for epoch in epochs:
        current: dict[int, list[reference.Entry]] = {}
        for batch in epoch:
            memory.record(*batch)
            for sample, errors in zip(batch[0].tolist(), reference.errors_of(*batch[1:])):
                current.setdefault(sample, []).extend(errors)
            expect(memory, previous)
        memory.advance()
        previous = current
        expect(memory, previous)


@settings(max_examples=30, deadline=None)
@given(st.lists(batches(), min_size=2, max_size=4), st.integers(1, 5), st.randoms())
def test_order_of_visits_does_not_matter(recorded: list[tuple[Tensor, ...]], n: int, random) -> None:
    shuffled = random.sample(recorded, len(recorded))
    result = []
    for order in (recorded, shuffled):
        memory = HardTokenMemory(SAMPLES, n)
        for batch in order:
            memory.record(*batch)
        memory.advance()
        result.append(memory.lookup(torch.arange(SAMPLES)))
    assert torch.equal(result[0].position, result[1].position) and torch.equal(result[0].token, result[1].token)


def one_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = torch.tensor([4, 1])
    prediction = torch.tensor([[3, 3, 3, 3], [1, 2, -1, 2]])
    labels = torch.tensor([[0, 3, 0, -100], [1, 1, 1, 1]])
    deviation = torch.tensor([[1.0, 9.0, 2.0, 9.0], [0.0, 0.5, 9.0, 0.25]])
    return ids, prediction, labels, deviation


def test_a_case_by_hand() -> None:
    memory = HardTokenMemory(5, 3)
    memory.record(*one_batch())
    assert memory.lookup(torch.tensor([4])).position.tolist() == [[-1, -1, -1]]
    memory.advance()
    result = memory.lookup(torch.tensor([4, 0, 1]))
    assert result.position.tolist() == [[2, 0, -1], [-1, -1, -1], [1, 3, -1]]
    assert result.token.tolist() == [[3, 3, -1], [-1, -1, -1], [2, 2, -1]]
    memory.advance()
    assert (memory.lookup(torch.arange(5)).position == -1).all()


def test_a_sample_without_errors_forgets_its_old_ones() -> None:
    memory = HardTokenMemory(5, 3)
    memory.record(*one_batch())
    memory.advance()
    ids, _, labels, deviation = one_batch()
    memory.record(ids, labels.clamp(min=0), labels, deviation)
    memory.advance()
    assert (memory.lookup(torch.arange(5)).position == -1).all()


def test_gradients_and_other_dtypes_are_accepted() -> None:
    ids, prediction, labels, deviation = one_batch()
    memory = HardTokenMemory(5, 3)
    memory.record(ids, prediction, labels, deviation.bfloat16().requires_grad_())
    memory.advance()
    assert memory.lookup(ids).position.tolist() == [[2, 0, -1], [1, 3, -1]]


def test_own_ignore_index() -> None:
    memory = HardTokenMemory(1, 4, ignore_index=7)
    memory.record(torch.tensor([0]), torch.tensor([[1, 1]]), torch.tensor([[7, -100]]), torch.ones(1, 2))
    memory.advance()
    assert memory.lookup(torch.tensor([0])).position.tolist() == [[1, -1, -1, -1]]


@pytest.mark.parametrize("ids", [[-1, 0], [0, 5]])
def test_ids_out_of_range(ids: list[int]) -> None:
    memory = HardTokenMemory(5, 3)
    batch = one_batch()[1:]
    with pytest.raises(ValueError, match="sample_ids must be in"):
        memory.record(torch.tensor(ids), *batch)
    with pytest.raises(ValueError, match="sample_ids must be in"):
        memory.lookup(torch.tensor(ids))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.tensor([1]), "prediction must be"),
        (0, torch.tensor([1.0, 2.0]), "sample_ids must be an int64"),
        (1, torch.zeros(2, dtype=torch.int64), "prediction must be"),
        (2, torch.zeros(2, 3, dtype=torch.int64), "labels must be an int64"),
        (3, torch.zeros(2, 5), "deviation must be a float"),
    ],
)
def test_wrong_arguments_are_named(position: int, wrong: Tensor, message: str) -> None:
    batch = list(one_batch())
    batch[position] = wrong
    with pytest.raises(ValueError, match=message):
        HardTokenMemory(5, 3).record(*batch)


@pytest.mark.parametrize(("samples", "n", "name"), [(0, 3, "num_samples"), (3, 0, "n must be an integer >= 1, got 0")])
def test_sizes_must_be_positive(samples: int, n: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        HardTokenMemory(samples, n)


def test_many_threads_on_one_row_agree_with_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, labels = torch.randint(0, 4, (2, 400, 300), generator=generator)
    deviation = torch.rand(400, 300, generator=generator)
    ids = torch.randint(0, 2, (400,), generator=generator)
    result = []
    threads = torch.get_num_threads()
    for path, count in (("native", 4), ("plain", 1)):
        memory = HardTokenMemory(2, 64)
        torch.set_num_threads(count)
        try:
            with native(path == "native"):
                memory.record(ids, prediction, labels, deviation)
        finally:
            torch.set_num_threads(threads)
        memory.advance()
        result.append(memory.lookup(torch.tensor([0, 1])))
    assert torch.equal(result[0].position, result[1].position) and torch.equal(result[0].token, result[1].token)


def test_predictions_must_fit_into_the_rows() -> None:
    labels, deviation = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3)
    memory = HardTokenMemory(2, 2)
    memory.record(torch.tensor([0]), labels + 2**31 - 1, labels, deviation)
    for token in (2**31, 2**32 + 5):
        with pytest.raises(ValueError, match=rf"^prediction must be below 2\*\*31, got {token}$"):
            memory.record(torch.tensor([1]), labels + token, labels, deviation)
    memory.advance()
    assert memory.lookup(torch.tensor([0, 1])).token.tolist() == [[2**31 - 1] * 2, [-1, -1]]
    with pytest.raises(ValueError, match=r"^prediction must be an int64 \[1, T\] tensor, got int32 \[1, 3\]"):
        memory.record(torch.tensor([0]), labels.int() + 1, labels, deviation)


def test_where_looking_would_wait_advance_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: `record` keeps the largest prediction on the device, and an empty batch has none."""
    monkeypatch.setattr("ntpseg.memory.memory.readable", lambda tensor: False)
    labels = torch.zeros(1, 3, dtype=torch.int64)
    memory = HardTokenMemory(2, 2)
    for token in (5, 2**31, 7):
        memory.record(torch.tensor([0]), labels + token, labels, torch.ones(1, 3))
    memory.record(torch.zeros(0, dtype=torch.int64), labels[:0], labels[:0], torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"^prediction must be below 2\*\*31, got 2147483648$"):
        memory.advance()
    memory.advance()


@pytest.mark.parametrize("path", [None, 3, b"x", True])
def test_a_mapped_memory_needs_a_folder(path: object) -> None:
    with pytest.raises(ValueError, match=r"^path must be a folder for storage 'mapped' and None for any other, got "):
        HardTokenMemory(2, 2, storage="mapped", path=path)


@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:99", 1.5, 2**70])
def test_a_device_must_be_one(device: object) -> None:
    with pytest.raises(ValueError, match=r"^device must be one that "):
        HardTokenMemory(2, 2, device)
