"""Content keys find their samples: through collisions, after being opened again, and into another data set."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ntpseg import HardTokenMemory
from ntpseg.memory import KeyIndex, build_index, renumber, sample_keys


def names(*numbers: int) -> list[str]:
    return [f"image-{number}.png" for number in numbers]


def test_every_key_is_found_and_no_other(tmp_path: Path) -> None:
    index = build_index(tmp_path, (names(*range(start, start + 700)) for start in range(0, 7000, 700)), 7000)
    order = torch.randperm(7000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(index.ids(sample_keys(names(*order.tolist()))), order)
    assert (index.ids(sample_keys(names(*range(7000, 9000)))) == -1).all()
    assert np.array_equal(index.keys(order), sample_keys(names(*order.tolist())))
    assert (tmp_path / "keys").stat().st_size + (tmp_path / "slots").stat().st_size == 24 * 7000


def test_keys_that_want_the_same_slot(tmp_path: Path) -> None:
    # 16 slots: all start at the last one and go on at the first; the 2nd and 3rd share their first 64 bits.
    keys = np.array([[15, 0], [31, 0], [31, 1], [47, 0], [15, 2], [0, 0], [1, 0]], dtype=np.uint64)
    index = KeyIndex(tmp_path, 8)
    assert index.add(keys[:3]).tolist() == [0, 1, 2]
    assert index.add(keys[3:]).tolist() == [3, 4, 5, 6]
    assert index.ids(keys).tolist() == list(range(7))
    assert index.ids(keys + np.array([0, 9], dtype=np.uint64)).tolist() == [-1] * 7


def test_a_key_twice_is_named_and_nothing_added(tmp_path: Path) -> None:
    index = build_index(tmp_path, [names(0, 1, 2)], 9)
    for part, message in (
        (names(5, 1), "must be different, got that of sample 4 for sample 1 too"),
        (names(5, 6, 5), "must be different, got that of sample 5 for sample 3 too"),
        (names(*range(10, 17)), "keys must be at most 9 together, got 10"),
    ):
        with pytest.raises(ValueError, match=message):
            index.add(sample_keys(part))
        assert len(index) == 3 and (index.ids(sample_keys(part)) >= 0).sum() == part.count(names(1)[0])


def test_an_index_is_opened_as_it_was_flushed(tmp_path: Path) -> None:
    index = build_index(tmp_path, [names(0, 1)], 9)
    index.add(sample_keys(names(2)))  # as if the process were killed after it
    again = KeyIndex(tmp_path)
    assert len(again) == 2 and again.ids(sample_keys(names(0, 1, 2))).tolist() == [0, 1, -1]
    assert again.add(sample_keys(names(3, 2))).tolist() == [2, 3]
    assert again.ids(sample_keys(names(0, 1, 2, 3))).tolist() == [0, 1, 3, 2]
    with pytest.raises(ValueError, match=r"capacity must be 9 as in .*, got 10"):
        KeyIndex(tmp_path, 10)
    (tmp_path / "slots").write_bytes(b"")
    with pytest.raises(ValueError, match="slots must have 72 bytes, got 0; remove"):
        KeyIndex(tmp_path)
    (tmp_path / "keys.json").write_text("{")
    with pytest.raises(ValueError, match=r"keys.json must be the header of an index, got another file"):
        KeyIndex(tmp_path)


def test_what_killed_processes_left_is_taken_back(tmp_path: Path) -> None:
    index, folder, capacity = build_index(tmp_path / "0", [names(0)], 4), tmp_path / "0", 4
    for killed in range(1, 5):  # each leaves three of eight slots: without an end no slot would be free
        index.add(sample_keys(names(*range(10 * killed, 10 * killed + 3))))
        folder = Path(shutil.copytree(folder, tmp_path / str(killed)))  # what the disk has if it dies here
        index = KeyIndex(folder)
        slots = np.fromfile(folder / "slots", "<u4")
        assert sorted(slots) == [0] * (2 * capacity - 1) + [1]
    assert index.ids(sample_keys(names(0, 10, 20, 99))).tolist() == [0, -1, -1, -1]
    assert index.add(sample_keys(names(99, 41, 10))).tolist() == [1, 2, 3]
    assert index.ids(sample_keys(names(10, 41, 0, 42))).tolist() == [3, 2, 0, -1]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="capacity must be an integer"):
        KeyIndex(tmp_path / "new")
    index = KeyIndex(tmp_path, 3)
    with pytest.raises(ValueError, match=r"keys must be \[B, 2\] uint64"):
        index.ids(np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"ids must be in \[0, 0\), got 0 .. 0"):
        index.keys(torch.zeros(1, dtype=torch.int64))


def test_errors_follow_their_samples_into_another_data_set(tmp_path: Path) -> None:
    old = build_index(tmp_path / "old", [names(*range(20))], 20)
    kept = [19, 3, 7, 0, 12, 5]
    new = build_index(tmp_path / "new", [names(100, *kept, 101)], 8)
    generator = torch.Generator().manual_seed(0)
    memory = HardTokenMemory(20, 4, key="old")
    prediction, labels = torch.randint(0, 3, (2, 16, 6), generator=generator)
    memory.record(torch.arange(16), prediction, labels, torch.rand(16, 6, generator=generator))
    memory.advance()
    memory.record(torch.arange(2, 9), prediction[:7], labels[:7], torch.rand(7, 6, generator=generator))
    other = HardTokenMemory(8, 4, key="new")
    other.load_state_dict(renumber(memory.state_dict(), old, new, "new"))
    for _ in range(2):
        mine, theirs = other.lookup(torch.arange(8)), memory.lookup(torch.tensor(kept))
        assert torch.equal(mine.token[1:7], theirs.token) and torch.equal(mine.position[1:7], theirs.position)
        assert (mine.token[[0, 7]] == -1).all() and (mine.token >= 0).any()
        for each in (memory, other):
            each.advance()
