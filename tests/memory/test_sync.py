"""Three gloo ranks that saw different samples end with what one process would hold."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ntpseg import HardTokenMemory
from ntpseg.memory import exchange

SAMPLES, N, RANKS = 40, 5, 3


def batch(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    prediction, labels = torch.randint(0, 4, (2, 8, 12), generator=generator)
    ids = torch.randint(0, SAMPLES, (8,), generator=generator)
    return ids, prediction, labels, torch.randint(0, 9, (8, 12), generator=generator).float()


def rank_main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    exchange._BYTES_PER_ROUND = 2000  # several rounds
    memory = HardTokenMemory(SAMPLES, N)
    for step in range(1 + rank):
        memory.record(*batch(10 * step + rank))
    memory.advance()
    memory.sync()
    memory.sync()
    memory.record(*batch(100 + rank))
    memory.sync()
    torch.save(memory.state_dict(), f"{out}/{rank}.pt")
    if rank == 0:
        memory.advance()
    try:
        memory.sync()
    except ValueError as error:
        Path(f"{out}/{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path / "store"), str(tmp_path)), nprocs=RANKS)
    single = HardTokenMemory(SAMPLES, N)
    for rank in range(RANKS):
        for step in range(1 + rank):
            single.record(*batch(10 * step + rank))
    single.advance()
    for rank in range(RANKS):
        single.record(*batch(100 + rank))
    expected = single.state_dict()
    for rank in range(RANKS):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for buffer in ("served", "recording"):
            for name, tensor in expected[buffer].items():
                assert torch.equal(state[buffer][name], tensor), (rank, buffer, name)
        assert "same epoch, got 2 .. 3" in (tmp_path / f"{rank}.txt").read_text()


def test_without_a_process_group_nothing_happens() -> None:
    memory = HardTokenMemory(SAMPLES, N)
    memory.record(*batch(0))
    before = memory.state_dict()["recording"]
    memory.sync()
    after = memory.state_dict()["recording"]
    assert all(torch.equal(before[name], after[name]) for name in before)
