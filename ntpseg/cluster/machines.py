"""Kinds of GPUs and the machines they are sold in: what plans and scaling curves start from, as makers state it.

Makers give both directions of a link together; here every bandwidth is that of one direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Link = Literal["nvlink", "pcie"]
_GB = 10**9
_TFLOPS = 10**12
_NVIDIA = "https://www.nvidia.com/en-us/data-center"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in the machine that it is usually sold in.

    Attributes:
        name: what it is called.
        memory: bytes, in decimal gigabytes as the maker states it; most drivers show some percent more.
        bf16_flops: dense bfloat16 products with float32 accumulators, FLOP/s, without sparsity.
        fp32_flops: float32 outside the tensor cores, FLOP/s.
        memory_bandwidth: of its memory, bytes/s.
        node_bandwidth: to the other GPUs of a machine, bytes/s in one direction.
        network_bandwidth: to other machines, bytes/s in one direction and per GPU: that of the maker's reference
            machine, where there is one, else of 100 Gbit/s for a machine.
        link: what connects the GPUs of a machine: ``nvlink`` (or AMD's Infinity Fabric) or ``pcie``.
        gpus_per_node: of a machine.
        source: of the figures.
    """

    name: str
    memory: float
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    link: Link
    gpus_per_node: int
    source: str


def _gpu(
    name: str,
    memory: float,
    bf16: float,
    fp32: float,
    bandwidth: float,
    node: float,
    network: float,
    source: str,
    link: Link = "nvlink",
    gpus_per_node: int = 8,
) -> Gpu:
    """In GB, TFLOP/s and GB/s."""
    rates = (memory * _GB, bf16 * _TFLOPS, fp32 * _TFLOPS, bandwidth * _GB, node * _GB, network * _GB)
    return Gpu(name, *rates, link, gpus_per_node, source)


GPUS: dict[str, Gpu] = {
    "a100-40gb": _gpu(
        "A100 SXM 40 GB", 40, 312, 19.5, 1555, 300, 25, f"{_NVIDIA}/a100 data sheet; DGX A100: 8 x 200 Gbit/s"
    ),
    "a100": _gpu(
        "A100 SXM 80 GB", 80, 312, 19.5, 2039, 300, 25, f"{_NVIDIA}/a100 data sheet; DGX A100: 8 x 200 Gbit/s"
    ),
    "h100": _gpu("H100 SXM 80 GB", 80, 989, 67, 3350, 450, 50, f"{_NVIDIA}/h100 data sheet; DGX H100: 8 x 400 Gbit/s"),
    "h100-pcie": _gpu(
        "H100 PCIe 80 GB", 80, 756, 51, 2000, 64, 1.56, f"{_NVIDIA}/h100 data sheet; PCIe 5.0 x16", "pcie"
    ),
    "h200": _gpu(
        "H200 SXM 141 GB", 141, 989, 67, 4800, 450, 50, f"{_NVIDIA}/h200 data sheet; DGX H200: 8 x 400 Gbit/s"
    ),
    "b200": _gpu("B200 SXM 180 GB", 180, 2250, 75, 7700, 900, 50, f"{_NVIDIA}/dgx-b200 data sheet; 8 x 400 Gbit/s"),
    "l40s": _gpu("L40S 48 GB", 48, 362, 91.6, 864, 32, 1.56, f"{_NVIDIA}/l40s data sheet; PCIe 4.0 x16", "pcie"),
    "l4": _gpu("L4 24 GB", 24, 121, 30.3, 300, 32, 1.56, f"{_NVIDIA}/l4 data sheet; PCIe 4.0 x16", "pcie"),
    "a10": _gpu(
        "A10 24 GB", 24, 125, 31.2, 600, 32, 1.56, f"{_NVIDIA}/products/a10-gpu data sheet; PCIe 4.0 x16", "pcie"
    ),
    "rtx4090": _gpu(
        "RTX 4090 24 GB", 24, 165, 82.6, 1008, 32, 1.56, "NVIDIA Ada GPU architecture white paper; PCIe 4.0 x16", "pcie"
    ),
    "mi300x": _gpu("MI300X 192 GB", 192, 1307, 163, 5300, 448, 50, "AMD Instinct MI300X data sheet; 8 x 400 Gbit/s"),
}


def gpu(name: str) -> Gpu:
    """The GPU of a name, in capitals or not.

    Raises:
        ValueError: it is not in the table.
    """
    key = name.lower().replace("_", "-")
    if key not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[key]
