"""Time of collectives: the alpha-beta model over two levels, GPUs in a node and nodes in a network.

The steps and latencies are those of NCCL's own model (src/graph/tuning.cc): with n ranks on m nodes a ring all-reduce
takes 2 (n - 1) steps of which 2 (m - 1) cross the network, an all-gather or reduce-scatter half of that; a tree goes up
and down through a node's GPUs and log2 m levels of nodes. Every GPU's adapter carries a ring of its own, so a ring runs
at the slower of a link and all adapters of a node together. The quicker of NCCL's protocols, and for an all-reduce of
ring and tree, is taken.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ntpseg.cluster.communication.collective import ALGORITHMS, Algorithm, Collective, Kind, wire_bytes
from ntpseg.cluster.machines import Gpu, Link
from ntpseg.utils.checks import check_integer

# Of the bandwidth of links and adapters, what collectives reach (bus bandwidth of nccl-tests over peak); assumed.
EFFICIENCY = 0.8
# Of the communication beside forward or backward, what computation can hide; assumed.
OVERLAP = 0.9
# Forward's share of a micro-batch: a third, or a quarter where backward runs the layers forward once more.
_FORWARD, _FORWARD_CHECKPOINTED = 1 / 3, 1 / 4


@dataclass(frozen=True)
class _Latency:
    """Seconds of NCCL's protocols: LL sends a flag with every word, half of the bandwidth, and Simple whole chunks.

    Attributes:
        base: of a call.
        link: of a hop inside a node.
        network: of a hop between nodes in a ring; `network_tree` in a tree.
        bandwidth: share of the bandwidth that the protocol reaches.
    """

    base: float
    link: float
    network: float
    network_tree: float
    bandwidth: float


def _protocols(link_ll: float, link_simple: float) -> tuple[_Latency, ...]:
    """NCCL's own constants, microseconds: src/graph/tuning.cc, baseLat and hwLat, version 2.19."""
    return (
        _Latency(6.6e-6, link_ll * 1e-6, 2.7e-6, 5.0e-6, 0.5),
        _Latency(8.4e-6, link_simple * 1e-6, 14.0e-6, 14.0e-6, 1.0),
    )


_PROTOCOLS: dict[Link, tuple[_Latency, ...]] = {"nvlink": _protocols(0.6, 3.4), "pcie": _protocols(1.0, 5.7)}


class StepSeconds(NamedTuple):
    """Seconds of a step's collectives.

    Attributes:
        total: of all, one after the other.
        exposed: of those that no computation hides.
    """

    total: float
    exposed: float


def step_seconds(
    traffic: Iterable[Collective],
    ranks: int,
    gpu: Gpu,
    micro_seconds: float,
    *,
    checkpointing: bool = False,
    overlap: float = OVERLAP,
) -> StepSeconds:
    """Predicted seconds of the collectives of one optimizer step.

    What runs beside forward or backward is hidden up to the share `overlap`, and no longer than that computation takes.

    Args:
        traffic: the collectives, see `step_traffic`.
        ranks: n; they fill nodes one after the other.
        gpu: with its links and network.
        micro_seconds: of the computation of one micro-batch, forward and backward.
        checkpointing: backward runs the layers forward once more; that is in `micro_seconds`.
        overlap: see `OVERLAP`.
    """
    forward = _FORWARD_CHECKPOINTED if checkpointing else _FORWARD
    beside = {"forward": forward, "backward": 1.0 - forward, "step": 0.0}
    spent: dict[tuple[str, int], float] = defaultdict(float)
    for each in traffic:
        spent[each.phase, each.micro_steps] += collective_seconds(each, ranks, gpu)
    hidden = sum(
        min(overlap * seconds, micro_steps * micro_seconds * beside[phase])
        for (phase, micro_steps), seconds in spent.items()
    )
    total = sum(spent.values())
    return StepSeconds(total, total - hidden)


def call_seconds(kind: Kind, payload: float, ranks: int, gpu: Gpu) -> float:
    """Predicted seconds of one call.

    Args:
        kind, payload: see `Collective`.
        ranks: n; they fill nodes one after the other.
        gpu: with its links and network.

    Raises:
        ValueError: `ranks` is below 1.
    """
    check_integer("ranks", ranks, 1)
    if ranks == 1:
        return 0.0
    algorithms = ALGORITHMS if kind == "all_reduce" else ALGORITHMS[:1]
    return min(
        _seconds(kind, payload, ranks, gpu, protocol, algorithm)
        for protocol in _PROTOCOLS[gpu.link]
        for algorithm in algorithms
    )


def collective_seconds(collective: Collective, ranks: int, gpu: Gpu) -> float:
    """Predicted seconds of all calls, one after the other."""
    return collective.calls * call_seconds(collective.kind, collective.payload, ranks, gpu)


def _seconds(kind: Kind, payload: float, ranks: int, gpu: Gpu, protocol: _Latency, algorithm: Algorithm) -> float:
    nodes = -(-ranks // gpu.gpus_per_node)
    inside = -(-ranks // nodes)
    bandwidth = gpu.node_bandwidth
    if nodes > 1:
        adapters = inside * gpu.network_bandwidth
        # each rank sends to each other one: what leaves the node does so through its own adapter alone
        bandwidth = min(bandwidth, gpu.network_bandwidth if kind == "all_to_all" else adapters)
    beta = wire_bytes(kind, payload, ranks, algorithm) / (bandwidth * EFFICIENCY * protocol.bandwidth)
    if algorithm == "tree":
        alpha = 2 * ((inside - 1) * protocol.link + math.ceil(math.log2(nodes)) * protocol.network_tree)
    else:
        rounds = 2 if kind == "all_reduce" else 1
        crossing = rounds * (nodes - 1)
        alpha = (rounds * (ranks - 1) - crossing) * protocol.link + crossing * protocol.network
    return protocol.base + alpha + beta
