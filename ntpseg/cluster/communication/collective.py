"""A collective and its bytes: the payload that a program hands over, and what then crosses each rank's link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ntpseg.utils.checks import check_choice, check_integer

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"]
Phase = Literal["forward", "backward", "step"]
Algorithm = Literal["ring", "tree"]

KINDS: tuple[Kind, ...] = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree")


@dataclass(frozen=True)
class Collective:
    """Calls of one kind and size in one optimizer step, all micro-batches together.

    Attributes:
        kind: one of `KINDS`.
        payload: bytes of one call, as nccl-tests counts: the whole tensor. Of an all-gather that is what comes out, of
            a reduce-scatter what goes in, of an all-to-all what a rank sends to all, itself included.
        calls: how many such calls.
        phase: beside which computation it runs: ``forward``, ``backward``, or ``step`` (between them: nothing hides
            it).
        reason: what for.
        micro_steps: number of forward and backward passes over which the calls are spread.
    """

    kind: Kind
    payload: int
    calls: int
    phase: Phase
    reason: str
    micro_steps: int = 1

    @property
    def bytes(self) -> int:
        """Payload of all calls."""
        return self.payload * self.calls


def wire_bytes(kind: Kind, payload: float, ranks: int, algorithm: Algorithm = "ring") -> float:
    """Bytes that one rank sends for one call.

    A ring reduce-scatters and all-gathers chunks of S / n: (n - 1) / n of S for either, twice that for an all-reduce,
    and as much for an all-to-all, since a rank keeps its own part. A broadcast passes all of S on. A (double binary)
    tree all-reduces by sending S up and S down (nccl-tests, doc/PERFORMANCE.md; Sanders et al. 2009).

    Args:
        kind: one of `KINDS`.
        payload: S, see `Collective`.
        ranks: n.
        algorithm: ``ring``, or ``tree`` (all-reduce and broadcast alone, the others are rings).

    Raises:
        ValueError: an unknown kind or algorithm, or `ranks` below 1.
    """
    check_choice("kind", kind, KINDS)
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_integer("ranks", ranks, 1)
    if ranks == 1:
        return 0.0
    share = (ranks - 1) / ranks
    if kind == "all_reduce":
        return 2.0 * payload * (1.0 if algorithm == "tree" else share)
    return float(payload) if kind == "broadcast" else share * payload


def total_bytes(collectives: Iterable[Collective]) -> int:
    """Payload of all."""
    return sum(each.bytes for each in collectives)


def by_kind(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """``{"calls": ..., "bytes": ...}`` of each kind that there is."""
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for each in collectives:
        calls[each.kind] += each.calls
        size[each.kind] += each.bytes
    return {kind: {"calls": calls[kind], "bytes": size[kind]} for kind in KINDS if calls[kind]}


def grouped(
    kind: Kind, payloads: Iterable[int], phase: Phase, reason: str, *, times: int = 1, micro_steps: int = 1
) -> list[Collective]:
    """One `Collective` for each size among the `payloads` of single calls, each of them made `times` times."""
    counts = Counter(payload for payload in payloads if payload)
    return [Collective(kind, size, count * times, phase, reason, micro_steps) for size, count in counts.items()]
