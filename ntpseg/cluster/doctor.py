"""Do all ranks of a launch reach each other, and are they the same? Run before a run, by the same launcher.

Ranks first meet in a key-value store (at ``MASTER_ADDR:MASTER_PORT``), which needs no collective: who does not come is
known by number. Then gloo, and NCCL where there are GPUs, are started with a time limit, checked and timed.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ntpseg.cluster.facts import RankFacts, rank_facts
from ntpseg.cluster.findings import Finding, find, ranges

_BYTES = (1 << 20, 64 << 20)


@dataclass(frozen=True)
class Diagnosis:
    """What rank 0 knows in the end.

    Attributes:
        facts: of every rank.
        skew: seconds that each rank's clock is ahead of rank 0's.
        bandwidth: bytes per second that an all-reduce of so many bytes reaches ("bus bandwidth": 2 (n - 1) / n times
            its bytes over its time, as nccl-tests counts), by backend and size.
        findings: what is wrong.
    """

    facts: list[RankFacts]
    skew: list[float]
    bandwidth: dict[str, dict[int, float]]
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Nothing fatal was found."""
        return not any(finding.fatal for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "healthy": self.healthy,
            "findings": [{"text": finding.text, "fatal": finding.fatal} for finding in self.findings],
            "ranks": [each.to_dict() for each in self.facts],
            "clock_skew_seconds": self.skew,
            "all_reduce_bytes_per_second": self.bandwidth,
        }


def diagnose(data: Path | None, output: Path, timeout: float) -> Diagnosis | None:
    """Runs all checks; every rank of the launch must call it.

    Args:
        data: the data set that all are to train on, or None.
        output: where runs are written.
        timeout: seconds that each step waits for ranks that do not come.

    Returns:
        The diagnosis on rank 0, None on the others.

    Raises:
        ValueError: a rank did not come, or a backend does not work; names the ranks.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    own = rank_facts(rank, device, data, output)
    if world == 1:
        return Diagnosis([own], [0.0], {}, find([own], [0.0]))
    store = _meet(rank, world, timeout)
    facts = _exchange(store, own, world, timeout)
    skew = _clock_skew(store, rank, world, timeout)
    bandwidth = {}
    for backend in ("gloo", *(("nccl",) if device.type == "cuda" else ())):
        bandwidth[backend] = _collectives(store, backend, rank, world, device, timeout)
    _leave(store, rank, world, timeout)
    return Diagnosis(facts, skew, bandwidth, find(facts, skew)) if rank == 0 else None


def _meet(rank: int, world: int, timeout: float) -> Any:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        raise ValueError(
            f"MASTER_ADDR and MASTER_PORT must be set where WORLD_SIZE is {world}, got {address} and {port}; "
            "start the ranks by torchrun"
        )
    # torchrun's agent holds a store at this place already
    master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not master:
        _connect(rank, address, int(port), timeout)  # PyTorch would print the stack of each try
    with _named(f"rank {rank} must {'listen on' if master else 'reach'} {address}:{port}"):
        # the store itself waits for nobody: who is missing must be known by number
        limit = datetime.timedelta(seconds=timeout)
        store = dist.TCPStore(address, int(port), None, master, timeout=limit, wait_for_workers=False)
    return dist.PrefixStore(f"ntpseg-doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _connect(rank: int, address: str, port: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or error
                raise ValueError(
                    f"rank {rank} on {socket.gethostname()} must reach {address}:{port} within {timeout:.0f} s, got: "
                    f"{reason}; is rank 0 started there, and the port open?"
                ) from error
            time.sleep(0.1)


def _exchange(store: Any, own: RankFacts, world: int, timeout: float) -> list[RankFacts]:
    store.set(f"facts/{own.rank}", json.dumps(own.to_dict()))
    _arrive(store, "facts", own.rank, world, timeout)
    return [RankFacts(**json.loads(store.get(f"facts/{rank}"))) for rank in range(world)]


def _arrive(store: Any, step: str, rank: int, world: int, timeout: float) -> None:
    """Waits until all ranks have come to a step; the error names those that have not."""
    store.set(f"{step}/here/{rank}", "1")
    keys = [f"{step}/here/{other}" for other in range(world)]
    deadline = time.monotonic() + timeout
    missing = list(range(world))
    while missing:
        missing = [other for other in missing if not store.check([keys[other]])]
        if missing and time.monotonic() > deadline:
            who = f"{'rank' if len(missing) == 1 else 'ranks'} {ranges(missing)}"
            raise ValueError(
                f"{who} of {world} must come to the step {step!r} within {timeout:.0f} s, got nothing; "
                "is it started, and not stopped by a firewall? Its own log says more"
            )
        if missing:
            time.sleep(0.05)


def _clock_skew(store: Any, rank: int, world: int, timeout: float) -> list[float]:
    """Cristian's algorithm: the answer's time against the middle between question and answer."""
    limit = datetime.timedelta(seconds=timeout)
    skew = [0.0] * world
    for other in range(1, world):
        if rank == 0:
            asked = time.time()
            store.set(f"ask/{other}", "1")
            with _named(f"rank {other} must answer within {timeout:.0f} s"):
                store.wait([f"answer/{other}"], limit)
                skew[other] = float(store.get(f"answer/{other}")) - (asked + time.time()) / 2
        elif rank == other:
            with _named(f"rank 0 must ask within {timeout * other:.0f} s"):
                store.wait([f"ask/{rank}"], limit * other)
            store.set(f"answer/{rank}", repr(time.time()))
    return skew


def _collectives(
    store: Any, backend: str, rank: int, world: int, device: torch.device, timeout: float
) -> dict[int, float]:
    """Starts a backend, checks a sum, and times all-reduces."""
    _arrive(store, backend, rank, world, timeout)
    where = device if backend == "nccl" else torch.device("cpu")
    limit = datetime.timedelta(seconds=timeout)
    with _named(f"{backend} must work between all ranks, failed on rank {rank}"):
        dist.init_process_group(
            backend, store=dist.PrefixStore(backend, store), rank=rank, world_size=world, timeout=limit
        )
    try:
        with _named(f"{backend} must add up over all ranks, failed on rank {rank}"):
            value = torch.tensor([float(rank + 1)], device=where)
            dist.all_reduce(value)
        expected = world * (world + 1) / 2
        if float(value) != expected:
            raise ValueError(f"{backend} must add the numbers 1 to {world} up to {expected:.0f}, got {float(value)}")
        rates = {}
        for size in _BYTES:
            tensor = torch.zeros(size // 4, device=where)
            seconds = []
            for _ in range(4):
                dist.barrier()
                start = time.perf_counter()
                dist.all_reduce(tensor)
                if where.type == "cuda":
                    torch.cuda.synchronize(where)
                seconds.append(time.perf_counter() - start)
            rates[size] = 2 * (world - 1) / world * size / statistics.median(seconds[1:])
        return rates
    finally:
        dist.destroy_process_group()


def _leave(store: Any, rank: int, world: int, timeout: float) -> None:
    """Rank 0 holds the store: it goes last."""
    store.set(f"done/{rank}", "1")
    if rank == 0:
        with contextlib.suppress(RuntimeError, dist.DistError):
            store.wait([f"done/{other}" for other in range(world)], datetime.timedelta(seconds=timeout))


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise ValueError(f"{what}, got: {str(error).splitlines()[0]}") from error
