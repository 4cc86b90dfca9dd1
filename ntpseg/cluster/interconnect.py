"""GPUs and what connects them: the figures that planning and scaling curves start from, each with its source.

Vendors give both directions of a link together; here every bandwidth is that of one direction. All of these are what
is printed on a data sheet: `Interconnect.efficiency` is what programs are assumed to reach of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ntpseg.utils.checks import check_choice


@dataclass(frozen=True)
class Latency:
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


@dataclass(frozen=True)
class Interconnect:
    """A GPU in the node that it is usually sold in.

    Attributes:
        name: what the command line calls it.
        gpus_per_node: of a node.
        link: bytes/s in one direction between GPUs of a node.
        network: bytes/s in one direction of the network adapter that belongs to each GPU.
        protocols: latencies inside and between nodes.
        peak_flops: dense bfloat16 operations/s.
        memory_bytes: of the GPU.
        source: where the figures are printed.
        efficiency: assumed share of `link` and `network` that collectives reach (bus bandwidth of nccl-tests over
            peak).
    """

    name: str
    gpus_per_node: int
    link: float
    network: float
    protocols: tuple[Latency, ...]
    peak_flops: float
    memory_bytes: int
    source: str
    efficiency: float = 0.8


def _protocols(link_ll: float, link_simple: float) -> tuple[Latency, ...]:
    """NCCL's own constants, microseconds: src/graph/tuning.cc, baseLat and hwLat, version 2.19."""
    return (
        Latency(6.6e-6, link_ll * 1e-6, 2.7e-6, 5.0e-6, 0.5),
        Latency(8.4e-6, link_simple * 1e-6, 14.0e-6, 14.0e-6, 1.0),
    )


_NVLINK, _PCIE = _protocols(0.6, 3.4), _protocols(1.0, 5.7)
_GB, _GIB = 1e9, 2**30

INTERCONNECTS: dict[str, Interconnect] = {
    each.name: each
    for each in (
        Interconnect(
            "a100",
            8,
            300 * _GB,
            25 * _GB,
            _NVLINK,
            312e12,
            80 * _GIB,
            "NVIDIA A100 80GB data sheet: NVLink 600 GB/s both ways, 312 TFLOPS; DGX A100: a 200 Gb/s adapter per GPU",
        ),
        Interconnect(
            "h100",
            8,
            450 * _GB,
            50 * _GB,
            _NVLINK,
            989e12,
            80 * _GIB,
            "NVIDIA H100 SXM data sheet: NVLink 900 GB/s both ways, 989 TFLOPS dense; DGX H100: a 400 Gb/s adapter "
            "per GPU",
        ),
        Interconnect(
            "h200",
            8,
            450 * _GB,
            50 * _GB,
            _NVLINK,
            989e12,
            141 * 10**9,
            "NVIDIA H200 SXM data sheet: NVLink 900 GB/s both ways, 989 TFLOPS dense, 141 GB; DGX H200: a 400 Gb/s "
            "adapter per GPU",
        ),
        Interconnect(
            "l40s",
            8,
            32 * _GB,
            12.5 * _GB,
            _PCIE,
            362e12,
            48 * _GIB,
            "NVIDIA L40S data sheet: PCIe Gen4 x16, 64 GB/s both ways, 362 TFLOPS dense; 8 GPUs a node and 100 Gb/s "
            "per GPU are assumed, servers differ",
        ),
    )
}


def interconnect(name: str) -> Interconnect:
    """The entry of a GPU.

    Raises:
        ValueError: there is none.
    """
    check_choice("gpu", name, INTERCONNECTS)
    return INTERCONNECTS[name]
