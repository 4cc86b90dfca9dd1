"""Which tile shapes and pipelines each architecture gets. The one place to change after measuring.

Every entry here is compiled ahead of time in the tests and checked for tensor-core instructions, spills and shared
memory. The choices come from those compilations (no spill, largest tile that fits), not yet from timings: see
docs/kernels.md. What `ntpseg bench tune` measured on a device goes before them (`tuned_configs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmConfig:
    """One tile of a matrix product ``[M, K] @ [K, N]``; upper case is what the kernels take as constexpr.

    Attributes:
        BLOCK_M, BLOCK_N, BLOCK_K: the tile.
        num_warps, num_stages: warps per program and software-pipeline depth.
        TMA: operands through tensor-memory descriptors (sm_90 and later) instead of pointers.
        FLATTEN: one pipeline over all tiles of the persistent program, so that the next tile loads during an epilogue.
        EPILOGUE_SUBTILE: the epilogue works on the tile in this many column parts (1, 2 or 4), which bounds its
            registers.
        GROUP_SIZE_M: row blocks that share a weight tile in L2.
        ctas_per_sm: programs per multiprocessor in the persistent grid.
        PINGPONG: two warp groups of `num_warps` that take turns (`ntpseg.kernels.pingpong_gemm`, sm_90, forward only).
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    TMA: bool
    FLATTEN: bool = False
    EPILOGUE_SUBTILE: int = 1
    GROUP_SIZE_M: int = 8
    ctas_per_sm: int = 1
    PINGPONG: bool = False


@dataclass(frozen=True)
class ArchConfigs:
    """The choices for one architecture.

    Attributes:
        forward: logits, ``M, N, K`` = rows, classes, features; its tile is the granularity of the gradient filter.
        d_hidden: filtered gradient of the hidden states, rows x features over the classes.
        d_weight: filtered gradient of the weight, classes x features over the rows.
    """

    forward: GemmConfig
    d_hidden: GemmConfig
    d_weight: GemmConfig


GEMM_CONFIGS: dict[str, ArchConfigs] = {
    "sm_80": ArchConfigs(
        forward=GemmConfig(128, 256, 32, num_warps=8, num_stages=4, TMA=False),
        d_hidden=GemmConfig(128, 128, 32, num_warps=8, num_stages=4, TMA=False),
        d_weight=GemmConfig(128, 128, 32, num_warps=8, num_stages=4, TMA=False),
    ),
    "sm_90": ArchConfigs(
        forward=GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=4),
        d_hidden=GemmConfig(128, 256, 64, num_warps=8, num_stages=3, TMA=True),
        d_weight=GemmConfig(128, 128, 64, num_warps=8, num_stages=3, TMA=True),
    ),
    "sm_100": ArchConfigs(
        # two programs per multiprocessor: one's epilogue hides behind the other's products
        forward=GemmConfig(128, 128, 64, num_warps=4, num_stages=3, TMA=True, EPILOGUE_SUBTILE=4, ctas_per_sm=2),
        d_hidden=GemmConfig(128, 256, 64, num_warps=8, num_stages=3, TMA=True),
        d_weight=GemmConfig(128, 128, 64, num_warps=8, num_stages=3, TMA=True),
    ),
    # The interpreter's cost is per program and iteration, whatever the tile.
    "interpreter": ArchConfigs(
        forward=GemmConfig(64, 128, 64, num_warps=4, num_stages=1, TMA=False),
        d_hidden=GemmConfig(64, 128, 64, num_warps=4, num_stages=1, TMA=False),
        d_weight=GemmConfig(64, 128, 64, num_warps=4, num_stages=1, TMA=False),
    ),
}

# Forward products for sm_90 that no GPU has shown to be right and faster yet: candidates, in no table entry. 64 rows
# exclude the gradient filter, whose dH tile has 128.
PINGPONG_CONFIGS: tuple[GemmConfig, ...] = (
    GemmConfig(128, 128, 64, num_warps=4, num_stages=5, TMA=True, PINGPONG=True),
    GemmConfig(64, 256, 64, num_warps=4, num_stages=4, TMA=True, PINGPONG=True),
)


def architecture(device: torch.device) -> str:
    """Key into `GEMM_CONFIGS` for a device.

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


def persistent_grid(config: GemmConfig, num_tiles: int, device: torch.device) -> int:
    """Number of programs of a persistent kernel that has this many tiles to do."""
    if device.type != "cuda":
        return min(2, max(num_tiles, 1))
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(num_tiles, config.ctas_per_sm * num_sms))
