"""Exchanges beside the training steps: the memory that blocking ones give, and not a byte more than is counted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ntpseg import HardTokenMemory
from ntpseg.memory import exchange

SAMPLES, N, RANKS, STEPS, EPOCHS, SIZE = 300, 5, 2, 12, 3, 10
KINDS = ("device", "pinned", "mapped")


def batch(epoch: int, step: int, rank: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1000 * epoch + 10 * step + rank)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
    ids = order[(step * RANKS + rank) * SIZE :][:SIZE]
    if step == 5:
        ids = order[:SIZE]  # both ranks see what rank 0 has sent already
    prediction, labels = torch.randint(0, 4, (2, SIZE, 12), generator=generator)
    return ids, prediction, labels, torch.randint(0, 9, (SIZE, 12), generator=generator).float()


def train(memory: HardTokenMemory, rank: int, *, overlapped: bool) -> list[dict[str, Any]]:
    states = []
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            memory.record(*batch(epoch, step, rank))
            if overlapped and step % 3 == 2:
                memory.sync(async_op=True)
        memory.sync()
        memory.advance()
        states.append(memory.state_dict())
    return states


def count_wire(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that a rank passes on in a ring, by what the collectives were given."""
    sent = [0]

    def gather(outputs: list[torch.Tensor], tensor: torch.Tensor, *args: Any) -> Any:
        sent[0] += sum(x.nbytes for x in outputs) - tensor.nbytes
        return original(outputs, tensor, *args)

    original = dist.all_gather
    monkeypatch.setattr(dist, "all_gather", gather)
    return sent


def rank_main(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=RANKS)
    exchange._BYTES_PER_ROUND = 1 << 12  # several rounds
    patch = pytest.MonkeyPatch()
    sent, result = count_wire(patch), {}
    for kind in KINDS:
        for overlapped in (False, True):
            path = Path(out, f"{kind}-{overlapped}-{rank}") if kind == "mapped" else None
            memory = HardTokenMemory(SAMPLES, N, storage=kind, path=path)
            sent[0] = 0
            states = train(memory, rank, overlapped=overlapped)
            result[kind, overlapped] = states, asdict(memory.traffic), sent[0]
            before = memory.traffic.rows_sent
            memory.sync()
            assert memory.traffic.rows_sent == before
    result["resumed"] = resumed(rank, states[-1])
    torch.save(result, f"{out}/{rank}.pt")
    if rank == 0:
        memory.advance()
    memory.sync(async_op=True)
    with pytest.raises(ValueError, match=f"same epoch, got {EPOCHS + 1} .. {EPOCHS + 2}"):
        memory.flush()
    dist.destroy_process_group()


def resumed(rank: int, saved: dict[str, Any]) -> list[int]:
    """Rows that all ranks sent after they loaded: the same, one rank alone, halves of the same."""
    sent = []
    half = {"sample", "count"}
    for name in ("same", "one", "halves"):
        memory = HardTokenMemory(SAMPLES, N)
        state = {**saved, "served": dict(saved["served"])}
        if name == "halves":
            served = state["served"]
            mine = served["sample"] % RANKS == rank
            entries = mine.repeat_interleave(served["count"].long())
            state["served"] = {k: v[mine] if k in half else v[entries] for k, v in served.items()}
        if name == "one" and rank:
            for _ in range(EPOCHS):
                memory.advance()
        else:
            memory.load_state_dict(state)
        memory.sync()
        loaded = memory.state_dict()["served"]
        assert all(torch.equal(loaded[k], saved["served"][k]) for k in loaded), name
        total = torch.tensor(memory.traffic.rows_sent)
        dist.all_reduce(total)
        sent.append(int(total))
        assert memory.traffic.compared_bytes > 0
    return sent


def test_overlapped_and_blocking_exchanges_give_the_memory_of_one_process(tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path),), nprocs=RANKS)
    single, expected = HardTokenMemory(SAMPLES, N), []
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            for rank in range(RANKS):
                single.record(*batch(epoch, step, rank))
        single.advance()
        expected.append(single.state_dict())
    for rank in range(RANKS):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind in KINDS:
            for overlapped in (False, True):
                states, traffic, wire = result[kind, overlapped]
                for state, right in zip(states, expected, strict=True):
                    same = [torch.equal(state["served"][name], right["served"][name]) for name in right["served"]]
                    assert all(same), (rank, kind, overlapped)
                assert traffic["bytes_sent"] == wire > traffic["payload_bytes"] > 0
                # Each row once; rank 0 records some again after it may have sent them.
                visits = EPOCHS * STEPS * SIZE
                rows = visits - EPOCHS * SIZE * (rank == 0)
                assert rows <= traffic["rows_sent"] <= (visits if overlapped else rows)
                assert traffic["rounds"] > EPOCHS and traffic["seconds"] > 0
        held = len(expected[-1]["served"]["sample"])
        assert result["resumed"] == [0, held, held]
