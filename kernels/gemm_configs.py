"""Which tile shapes and pipelines each architecture gets. The one place to change after measuring.

Every entry here is compiled ahead of time in the tests and checked for tensor-core instructions, spills and shared
memory. The choices come from those compilations (no spill, largest tile that fits), not yet from timings: see
docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmConfig:
    """One tile of a matrix product.

    Attributes:
        rows, classes, depth: tile of hidden rows, vocabulary classes and the reduced dimension.
        warps, stages: warps per program and software-pipeline depth.
        tma: operands through tensor-memory descriptors (sm_90 and later) instead of pointers.
        flatten: one pipeline over all tiles of the persistent program, so that the next tile loads during an epilogue.
        parts: the epilogue works on the tile in this many column parts (1, 2 or 4), which bounds its registers.
        group: row blocks that share a weight tile in L2.
        residents: programs per multiprocessor in the persistent grid.
    """

    rows: int
    classes: int
    depth: int
    warps: int
    stages: int
    tma: bool
    flatten: bool = False
    parts: int = 1
    group: int = 8
    residents: int = 1


@dataclass(frozen=True)
class Tiles:
    """The choices for one architecture: forward product, and the block-sparse gradients of the filter."""

    forward: GemmConfig
    d_hidden: GemmConfig
    d_weight: GemmConfig


# d_hidden tiles are rows x features with the classes reduced, d_weight tiles classes x features with the rows reduced;
# their `classes` is the feature tile. The forward tile fixes the granularity of the filter.
TABLE: dict[str, Tiles] = {
    "sm_80": Tiles(
        forward=GemmConfig(128, 256, 32, warps=8, stages=4, tma=False),
        d_hidden=GemmConfig(128, 128, 32, warps=8, stages=4, tma=False),
        d_weight=GemmConfig(128, 128, 32, warps=8, stages=4, tma=False),
    ),
    "sm_90": Tiles(
        forward=GemmConfig(128, 256, 64, warps=8, stages=4, tma=True, flatten=True, parts=4),
        d_hidden=GemmConfig(128, 256, 64, warps=8, stages=3, tma=True),
        d_weight=GemmConfig(128, 128, 64, warps=8, stages=3, tma=True),
    ),
    "sm_100": Tiles(
        # two programs per multiprocessor: one's epilogue hides behind the other's products
        forward=GemmConfig(128, 128, 64, warps=4, stages=3, tma=True, parts=4, residents=2),
        d_hidden=GemmConfig(128, 256, 64, warps=8, stages=3, tma=True),
        d_weight=GemmConfig(128, 128, 64, warps=8, stages=3, tma=True),
    ),
    # The interpreter's cost is per program and iteration, whatever the tile.
    "interpreter": Tiles(
        forward=GemmConfig(64, 128, 64, warps=4, stages=1, tma=False),
        d_hidden=GemmConfig(64, 128, 64, warps=4, stages=1, tma=False),
        d_weight=GemmConfig(64, 128, 64, warps=4, stages=1, tma=False),
    ),
}


def architecture(device: torch.device) -> str:
    """Key into `TABLE` for a device.

    Raises:
        ValueError: the device is older than sm_80 (no bf16 tensor cores).
    """
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"device must have compute capability 8.0 or higher for these kernels, got {major}.{minor}")
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    # sm_86, sm_89 and sm_120 have the instructions and the roughly 99 KiB of shared memory that the sm_80 tiles need
    return "sm_80"


def programs(config: GemmConfig, tiles: int, device: torch.device) -> int:
    """Size of a persistent grid."""
    if device.type != "cuda":
        return min(2, max(tiles, 1))
    return max(1, min(tiles, config.residents * torch.cuda.get_device_properties(device).multi_processor_count))
