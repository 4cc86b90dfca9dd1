"""Memories in host memory and in mapped files do what the one on the device does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ntpseg import HardTokenMemory
from ntpseg.memory import background, content_key


def batch(memory: HardTokenMemory, seed: int, size: int = 7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, memory.num_samples, (size,), generator=generator)
    prediction, labels = torch.randint(0, 5, (2, size, 24), generator=generator)
    return ids, prediction, labels, torch.rand(size, 24, generator=generator)


def same(first: HardTokenMemory, second: HardTokenMemory) -> bool:
    ids = torch.arange(first.num_samples)
    a, b = first.lookup(ids), second.lookup(ids)
    return torch.equal(a.position, b.position) and torch.equal(a.token, b.token)


def make(kind: str, folder: Path, **options: object) -> HardTokenMemory:
    path = folder / "memory" if kind == "mapped" else None
    return HardTokenMemory(30, 5, storage=kind, path=path, **options)


@pytest.mark.parametrize("kind", ["pinned", "mapped"])
def test_equals_the_memory_on_the_device(kind: str, tmp_path: Path) -> None:
    memory, expected = make(kind, tmp_path), HardTokenMemory(30, 5)
    for epoch in range(3):
        for step in range(40):  # more than may be in flight
            for each in (memory, expected):
                each.record(*batch(each, 100 * epoch + step % 4))
            memory.prefetch(batch(memory, step)[0])
            assert torch.equal(
                memory.lookup(batch(memory, step)[0]).token, expected.lookup(batch(memory, step)[0]).token
            )
        for each in (memory, expected):
            each.advance()
        assert same(memory, expected)
    saved, other = memory.state_dict(), expected.state_dict()
    for buffer in ("served", "recording"):
        assert all(torch.equal(saved[buffer][name], other[buffer][name]) for name in other[buffer])


def test_callers_may_reuse_their_tensors() -> None:
    memory, expected = HardTokenMemory(30, 5, storage="pinned"), HardTokenMemory(30, 5)
    for seed in range(20):
        tensors = batch(memory, seed)
        expected.record(*tensors)
        memory.record(*tensors)
        for tensor in tensors:
            tensor.zero_()
    memory.advance()
    expected.advance()
    assert same(memory, expected)


def test_prefetched_rows_are_the_ones_served(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HardTokenMemory(30, 5, storage="pinned")
    ids = batch(memory, 0)[0]
    memory.record(*batch(memory, 0))
    memory.advance()
    memory.prefetch(ids)
    direct = memory._background._gather(ids)
    monkeypatch.setattr(background.Background, "_gather", lambda self, expected: pytest.fail("was not prefetched"))
    assert torch.equal(memory.lookup(ids).token, direct[:, 2].long())


def test_prefetching_too_far_ahead_and_across_epochs_is_harmless() -> None:
    memory = HardTokenMemory(30, 5, storage="pinned")
    for seed in range(20):
        memory.prefetch(batch(memory, seed)[0])
    memory.record(*batch(memory, 0))
    memory.advance()
    assert (memory.lookup(batch(memory, 0)[0]).token >= 0).any()


def test_an_error_in_the_background_is_raised() -> None:
    memory = HardTokenMemory(30, 5, storage="pinned")
    memory._background.write(torch.tensor([1]), torch.zeros(2, 3, 5, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="entries must be"):
        memory.flush()


def test_a_mapped_memory_goes_on_where_it_stopped(tmp_path: Path) -> None:
    memory, expected = make("mapped", tmp_path, key="k"), HardTokenMemory(30, 5)
    for each in (memory, expected):
        each.record(*batch(each, 0))
        each.advance()
        each.record(*batch(each, 1))
    memory.flush()
    again = make("mapped", tmp_path, key="k")
    assert again.epoch == 2 and same(again, expected)
    for each in (again, expected):
        each.record(*batch(each, 2))
        each.advance()
    assert same(again, expected)


def test_a_state_moves_between_storages(tmp_path: Path) -> None:
    memory = HardTokenMemory(30, 5)
    memory.record(*batch(memory, 0))
    memory.advance()
    other = make("mapped", tmp_path)
    other.record(*batch(other, 9))
    other.load_state_dict(memory.state_dict())
    assert same(memory, other)
    assert same(memory, make("mapped", tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 31}, "num_samples must be 31 as in this memory, got 30"),
        ({"n": 6}, "n must be 6 as in this memory, got 5"),
        ({"key": "b"}, "content key must be 'b', got 'a'"),
        ({"deviation": "codebook"}, "deviation must be 'codebook' as in this memory, got 'margin'"),
    ],
)
def test_files_of_another_memory_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    make("mapped", tmp_path, key="a")
    before = {file.name: file.stat().st_size for file in (tmp_path / "memory").iterdir()}
    with pytest.raises(ValueError, match=message):
        HardTokenMemory(
            **{"num_samples": 30, "n": 5, "storage": "mapped", "path": tmp_path / "memory", "key": "a", **options}
        )
    assert before == {file.name: file.stat().st_size for file in (tmp_path / "memory").iterdir()}


def test_files_of_another_version_are_refused(tmp_path: Path) -> None:
    make("mapped", tmp_path)
    header = tmp_path / "memory" / "header.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "version": 7}))
    with pytest.raises(ValueError, match="version must be 1 for this release of ntpseg, got 7"):
        make("mapped", tmp_path)


def test_a_hundred_million_samples_take_no_room_before_they_are_seen(tmp_path: Path) -> None:
    memory = HardTokenMemory(100_000_000, 64, storage="mapped", path=tmp_path)
    ids = torch.tensor([0, 99_999_999])
    memory.record(ids, torch.full((2, 3), 7), torch.tensor([[7, 1, 7], [1, 1, 1]]), torch.rand(2, 3))
    memory.advance()
    assert (memory.lookup(ids).token == 7).sum(1).tolist() == [1, 3]
    rows = (tmp_path / "rows").stat()
    assert rows.st_size == 2 * 100_000_000 * 3 * 64 * 4
    assert rows.st_blocks * 512 < 1 << 20


def test_a_million_samples(tmp_path: Path) -> None:
    samples, size = 1_000_000, 20_000
    memory = HardTokenMemory(samples, 64, storage="mapped", path=tmp_path)
    order = torch.randperm(samples)
    labels = torch.zeros(size, 64, dtype=torch.int64)
    for ids in order.split(size):
        # Sample i is wrong everywhere, with token 1 + i % 1000, most of all at position i % 64.
        deviation = torch.ones(size, 64).scatter_(1, (ids % 64).unsqueeze(1), 2.0)
        memory.record(ids, (1 + ids % 1000).unsqueeze(1).expand(-1, 64).contiguous(), labels, deviation)
    memory.advance()
    for ids in order[:40_000].split(size):
        memory.prefetch(ids)
        result = memory.lookup(ids)
        assert torch.equal(result.position[:, 0], ids % 64)
        assert torch.equal(result.token, (1 + ids % 1000).unsqueeze(1).expand(-1, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "tape"}, "storage must be one of device, pinned, mapped, got 'tape'"),
        ({"storage": "mapped"}, "path must be a folder .*, got None"),
        ({"path": "somewhere"}, "path must be .*, got 'somewhere'"),
        ({"deviation": "entropy"}, "deviation must be one of margin, nll, codebook, got 'entropy'"),
    ],
)
def test_unknown_options_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardTokenMemory(3, 2, **options)


def test_content_key_sees_content_and_order() -> None:
    assert content_key(["a", "b"]) == content_key([b"a", b"b"])
    assert len({content_key(x) for x in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], [])}) == 5


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("rows", lambda data: data[: len(data) // 2], "rows must have .* bytes, got"),
        ("stamp", lambda data: b"", "stamp must have .* bytes, got 0"),
        ("stamp", lambda data: b"\xff" * len(data), "stamp must hold epochs up to 2"),
        ("header.json", lambda data: data[: len(data) // 2], "header.json must be JSON"),
        ("header.json", lambda data: data.replace(b'"epoch": 2', b'"epoch": -2'), "epoch must be an integer from 1 on"),
    ],
)
def test_damaged_files_are_refused(name: str, damage, message: str, tmp_path: Path) -> None:
    memory = make("mapped", tmp_path)
    memory.record(*batch(memory, 0))
    memory.advance()
    memory.flush()
    path = tmp_path / "memory" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        make("mapped", tmp_path)
