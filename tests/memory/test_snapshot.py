"""Checkpoints of a mapped memory: only what changed is written, in bounded memory, and all of it is read again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ntpseg import HardTokenMemory
from ntpseg.memory import snapshot
from ntpseg.utils.manifest import MANIFEST, damage, linked_hashes, write_manifest

SAMPLES, N = 400, 5
NAME = "hard_tokens_0.pt"


def batch(seed: int, size: int = 40) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(SAMPLES, generator=generator)[:size]
    prediction, labels = torch.randint(0, 5, (2, size, 24), generator=generator)
    return ids, prediction, labels, torch.rand(size, 24, generator=generator)


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    assert first["epoch"] == second["epoch"]
    names = ("served", "recording")
    return all(torch.equal(first[name][field], second[name][field]) for name in names for field in first[name])


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.pt") if path.name != NAME}


def rows(folder: Path, names: set[str]) -> int:
    return sum(len(torch.load(folder / name, weights_only=True)["sample"]) for name in names)


@pytest.fixture
def memory(tmp_path: Path) -> HardTokenMemory:
    return HardTokenMemory(SAMPLES, N, storage="mapped", path=tmp_path / "memory")


def test_only_what_changed_is_written_and_the_rest_linked(memory: HardTokenMemory, tmp_path: Path) -> None:
    expected, before = HardTokenMemory(SAMPLES, N), {}
    for save in range(7):
        for each in (memory, expected):
            each.record(*batch(save))
            if save in (2, 4):
                each.advance()
                each.record(*batch(50 + save, 7))
        folder = tmp_path / f"checkpoint-{save}"
        memory.save(folder / NAME)
        now = parts(folder)
        new = now.keys() - before.keys()
        assert rows(folder, new) == (40 if save not in (2, 4) else 47)
        # What is left out is of epochs that nothing serves any more.
        assert len(before.keys() - now.keys()) == (save == 4) * 3
        assert all(before[name] == now[name] for name in before.keys() & now.keys())
        before = now
        if save:
            shutil.rmtree(tmp_path / f"checkpoint-{save - 1}")
        for kind, path in (("device", None), ("mapped", tmp_path / f"other-{save}")):
            other = HardTokenMemory(SAMPLES, N, storage=kind, path=path)
            other.record(*batch(99))
            other.load(folder / NAME)
            assert equal(other.state_dict(), expected.state_dict())
    merged = HardTokenMemory(SAMPLES, N)
    for _ in range(2):
        merged.advance()
    merged.record(*batch(70))
    merged.merge(folder / NAME)
    expected.record(*batch(70))
    assert equal(merged.state_dict(), expected.state_dict())


def test_without_the_last_folder_all_is_written(memory: HardTokenMemory, tmp_path: Path) -> None:
    memory.record(*batch(0))
    memory.save(tmp_path / "a" / NAME)
    shutil.rmtree(tmp_path / "a")
    memory.save(tmp_path / "b" / NAME)
    assert rows(tmp_path / "b", set(parts(tmp_path / "b"))) == 40
    other = HardTokenMemory(SAMPLES, N)
    other.load(tmp_path / "b" / NAME)
    assert equal(other.state_dict(), memory.state_dict())


def test_after_a_failed_save_all_is_written(
    memory: HardTokenMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.record(*batch(0))
    memory.save(tmp_path / "a" / NAME)
    memory.record(*batch(1))

    def full(path: Path, saved: dict[str, Any]) -> None:
        if "parts" in saved:
            raise OSError(28, "No space left on device")
        write(path, saved)

    write = snapshot.write
    monkeypatch.setattr(snapshot, "write", full)
    with pytest.raises(OSError, match="No space"):
        memory.save(tmp_path / "b" / NAME)
    monkeypatch.undo()
    memory.save(tmp_path / "c" / NAME)
    other = HardTokenMemory(SAMPLES, N)
    other.load(tmp_path / "c" / NAME)
    assert equal(other.state_dict(), memory.state_dict())


def test_after_a_load_nothing_of_the_replaced_state_is_saved(memory: HardTokenMemory, tmp_path: Path) -> None:
    loaded = HardTokenMemory(SAMPLES, N)
    loaded.record(*batch(5))
    memory.record(*batch(0))
    memory.save(tmp_path / "a" / NAME)
    memory.load_state_dict(loaded.state_dict())  # of the same epoch, so that rows of both could be merged
    for each in (memory, loaded):
        each.record(*batch(6))
    memory.save(tmp_path / "b" / NAME)
    assert not parts(tmp_path / "a").keys() & parts(tmp_path / "b").keys()
    memory.record(*batch(7))
    loaded.record(*batch(7))
    memory.save(tmp_path / "c" / NAME)  # and from there on by what changed
    assert parts(tmp_path / "b").items() < parts(tmp_path / "c").items()
    other = HardTokenMemory(SAMPLES, N)
    other.load(tmp_path / "c" / NAME)
    assert equal(other.state_dict(), loaded.state_dict())


def test_links_where_there_are_none_are_copies(
    memory: HardTokenMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(snapshot.os, "link", refuse)
    for step in range(2):
        memory.record(*batch(step))
        memory.save(tmp_path / str(step) / NAME)
    first, second = (parts(tmp_path / str(step)) for step in range(2))
    assert first.keys() < second.keys() and first != {name: second[name] for name in first}
    other = HardTokenMemory(SAMPLES, N)
    other.load(tmp_path / "1" / NAME)
    assert equal(other.state_dict(), memory.state_dict())


def test_after_many_saves_all_is_written_again(
    memory: HardTokenMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_INCREMENTS", 3)
    counts = []
    for step in range(8):
        memory.record(*batch(step))
        memory.save(tmp_path / str(step) / NAME)
        counts.append(len(parts(tmp_path / str(step))))
    assert counts == [1, 2, 3, 1, 2, 3, 1, 2]


def test_samples_without_an_error_are_kept_as_visited(memory: HardTokenMemory, tmp_path: Path) -> None:
    right = torch.zeros(3, 4, dtype=torch.int64)
    memory.record(torch.arange(3), right, right, torch.rand(3, 4))
    memory.save(tmp_path / NAME)
    other = HardTokenMemory(SAMPLES, N)
    other.load(tmp_path / NAME)
    assert other.state_dict()["recording"]["sample"].tolist() == [0, 1, 2]
    assert equal(other.state_dict(), memory.state_dict())


@pytest.mark.parametrize("how", ["missing", "cut", "elsewhere", "of another epoch"])
def test_damaged_parts_are_named(memory: HardTokenMemory, tmp_path: Path, how: str) -> None:
    memory.record(*batch(0))
    memory.save(tmp_path / NAME)
    saved = torch.load(tmp_path / NAME, weights_only=True)
    part = tmp_path / saved["parts"][0]["name"]
    if how == "missing":
        part.unlink()
    elif how == "cut":
        part.write_bytes(part.read_bytes()[:100])
    else:
        changed = {"name": "../other.pt"} if how == "elsewhere" else {"epoch": 5}
        torch.save({**saved, "parts": [{**saved["parts"][0], **changed}]}, tmp_path / NAME)
    message = f"{part.name} must hold a hard-token memory" if how in ("missing", "cut") else "must name files of epochs"
    with pytest.raises(ValueError, match=message):
        HardTokenMemory(SAMPLES, N).load(tmp_path / NAME)


@pytest.mark.parametrize("how", ["load", "merge"])
def test_a_damaged_part_leaves_the_memory_as_it_was(memory: HardTokenMemory, tmp_path: Path, how: str) -> None:
    for number in (0, 1):
        memory.record(*batch(number))
        memory.save(tmp_path / str(number) / NAME)
    last = sorted((tmp_path / "1").glob("*-*.pt"))[-1]
    last.write_bytes(last.read_bytes()[:50])
    other = HardTokenMemory(SAMPLES, N)
    other.record(*batch(2))
    if how == "load":
        other.advance()
        other.record(*batch(3))
    before = other.state_dict()
    with pytest.raises(ValueError, match="must hold a hard-token memory"):
        getattr(other, how)(tmp_path / "1" / NAME)
    assert equal(other.state_dict(), before)


def test_hashes_of_linked_files_are_those_written(memory: HardTokenMemory, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for step, folder in enumerate(folders):
        memory.record(*batch(step))
        memory.save(folder / NAME)
        known = linked_hashes(folder, folders[:step])
        assert known.keys() == (set() if not step else parts(folders[0]).keys())
        write_manifest(folder, known=known)
        assert damage(folder) is None
    manifests = [json.loads((folder / MANIFEST).read_text())["sha256"] for folder in folders]
    assert len(manifests[1]) == 3
    linked = next(iter(parts(folders[0])))
    (folders[0] / linked).write_bytes(bytes((folders[0] / linked).stat().st_size))
    assert all("differs" in str(damage(folder)) for folder in folders)


GROWTH = """
import sys, threading, torch
from pathlib import Path
from ntpseg.memory import HardTokenMemory, snapshot, storage
torch.set_num_threads(1)
samples, entries, folder = int(sys.argv[1]), 64, Path(sys.argv[2])
storage._RESIDENT, snapshot._PART_BYTES = 32 << 20, 8 << 20

def resident():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")]

def use(memory, samples, folder):
    order = torch.randperm(samples)
    memory.record(order[:1000], *(x[:1000] for x in made)); memory.advance()
    for ids in order.split(2000):
        memory.lookup(ids)
        memory.record(ids, *(x[: len(ids)] for x in made))
        memory.wait()
        peak[:] = [max(a, b) for a, b in zip(peak, resident())]
    memory.save(folder / "saved.pt")
    again = HardTokenMemory(samples, entries, storage="mapped", path=folder / "again")
    again.load(folder / "saved.pt")

made = [torch.ones(2000, 64).long(), torch.zeros(2000, 64).long(), torch.rand(2000, 64)]
peak, done = [0, 0], threading.Event()
use(HardTokenMemory(1024, entries, storage="mapped", path=folder / "first"), 1024, folder / "a")
start = peak[:] = resident()

def watch():
    while not done.wait(0.02):
        peak[:] = [max(a, b) for a, b in zip(peak, resident())]

thread = threading.Thread(target=watch); thread.start()
use(HardTokenMemory(samples, entries, storage="mapped", path=folder / "second"), samples, folder / "b")
done.set(); thread.join()
print(*(b - a for a, b in zip(start, peak)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory from /proc")
def test_resident_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    samples = 200_000
    command = [sys.executable, "-c", GROWTH, str(samples), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    anonymous, mapped = map(float, done.stdout.split())
    # In MiB, where there are 147 of rows, read and written twice.
    assert anonymous < 100 and mapped < 75, (anonymous, mapped)
