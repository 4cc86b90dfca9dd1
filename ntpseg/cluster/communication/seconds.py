"""Time of a collective: the alpha-beta model over two levels, GPUs in a node and nodes in a network.

The steps and latencies are those of NCCL's own model (src/graph/tuning.cc): with n ranks on m nodes a ring all-reduce
takes 2 (n - 1) steps of which 2 (m - 1) cross the network, an all-gather or reduce-scatter half of that; a tree goes up
and down through a node's GPUs and log2 m levels of nodes. Every GPU's adapter carries a ring of its own, so a ring runs
at the slower of a link and all adapters of a node together. The quicker of NCCL's protocols, and for an all-reduce of
ring and tree, is taken.
"""

from __future__ import annotations

import math

from ntpseg.cluster.communication.collective import ALGORITHMS, Algorithm, Collective, Kind, wire_bytes
from ntpseg.cluster.interconnect import Interconnect, Latency
from ntpseg.utils.checks import check_integer


def call_seconds(kind: Kind, payload: float, ranks: int, hardware: Interconnect) -> float:
    """Predicted seconds of one call.

    Args:
        kind, payload: see `Collective`.
        ranks: n; they fill nodes one after the other.
        hardware: links and network.

    Raises:
        ValueError: `ranks` is below 1.
    """
    check_integer("ranks", ranks, 1)
    if ranks == 1:
        return 0.0
    algorithms = ALGORITHMS if kind == "all_reduce" else ALGORITHMS[:1]
    return min(
        _seconds(kind, payload, ranks, hardware, protocol, algorithm)
        for protocol in hardware.protocols
        for algorithm in algorithms
    )


def collective_seconds(collective: Collective, ranks: int, hardware: Interconnect) -> float:
    """Predicted seconds of all calls, one after the other."""
    return collective.calls * call_seconds(collective.kind, collective.payload, ranks, hardware)


def _seconds(
    kind: Kind, payload: float, ranks: int, hardware: Interconnect, protocol: Latency, algorithm: Algorithm
) -> float:
    nodes = -(-ranks // hardware.gpus_per_node)
    inside = -(-ranks // nodes)
    bandwidth = hardware.link
    if nodes > 1:
        adapters = inside * hardware.network
        # each rank sends to each other one: what leaves the node does so through its own adapter alone
        bandwidth = min(bandwidth, hardware.network if kind == "all_to_all" else adapters)
    beta = wire_bytes(kind, payload, ranks, algorithm) / (bandwidth * hardware.efficiency * protocol.bandwidth)
    if algorithm == "tree":
        alpha = 2 * ((inside - 1) * protocol.link + math.ceil(math.log2(nodes)) * protocol.network_tree)
    else:
        rounds = 2 if kind == "all_reduce" else 1
        crossing = rounds * (nodes - 1)
        alpha = (rounds * (ranks - 1) - crossing) * protocol.link + crossing * protocol.network
    return protocol.base + alpha + beta
