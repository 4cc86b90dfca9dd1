"""Times the forward product's candidates on this machine's GPU against cuBLAS: ``python -m benchmarks.tune``.

Prints one JSON row of the harness per shape and candidate. Its ratio is that to the cuBLAS product of the same operands
(bf16 out), so it carries the epilogue's cost too. The winner goes into `ntpseg.kernels.gemm_configs` by hand, with its
row as evidence.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Case, Comparison, Provider, Settings, run_case
from benchmarks.harness.rows import rounded
from benchmarks.harness.timing import Budget
from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, PINGPONG_CONFIGS, GemmConfig, architecture, persistent_grid
from ntpseg.kernels.workspace import Anchors, BlockStats

CANDIDATES: dict[str, tuple[GemmConfig, ...]] = {
    "sm_80": (
        GemmConfig(128, 256, 32, num_warps=8, num_stages=3, TMA=False),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=3, TMA=False),
        GemmConfig(128, 128, 32, num_warps=4, num_stages=4, TMA=False, ctas_per_sm=2),
    ),
    "sm_90": (
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=2),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, EPILOGUE_SUBTILE=4),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=4, GROUP_SIZE_M=4),
        GemmConfig(
            128, 256, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=4, GROUP_SIZE_M=16
        ),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=3, TMA=True, EPILOGUE_SUBTILE=1),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=3, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=1),
        GemmConfig(256, 128, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=2),
        GemmConfig(128, 128, 64, num_warps=4, num_stages=3, TMA=True, EPILOGUE_SUBTILE=2, ctas_per_sm=2),
        GemmConfig(128, 128, 64, num_warps=4, num_stages=3, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=4, ctas_per_sm=2),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True),
        *PINGPONG_CONFIGS,
    ),
    "sm_100": (
        GemmConfig(128, 128, 64, num_warps=8, num_stages=4, TMA=True),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=5, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=2),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, EPILOGUE_SUBTILE=4),
    ),
}


def comparison(rows: int, classes: int, width: int, settings: Settings) -> Comparison:
    """The configuration in use and all candidates, on operands of their own."""
    device = settings.device
    hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(classes, width, device=device, dtype=torch.bfloat16) * width**-0.5
    z_y = torch.zeros(rows, device=device)
    anchors = Anchors(z_y, z_y.clone(), z_y + 48.0)
    e, z = torch.empty(2, rows, -(-classes // 64) * 64, device=device, dtype=torch.bfloat16)

    def fused(config: GemmConfig) -> Callable[[], None]:
        block_stats = BlockStats.empty(-(-classes // config.BLOCK_N), rows, device)
        blocks = -(-rows // config.BLOCK_M)
        every = torch.arange(blocks, dtype=torch.int32, device=device)
        count = torch.full((), blocks, dtype=torch.int32, device=device)
        grid = persistent_grid(config, blocks * block_stats.row_sum.shape[0], device)
        return partial(anchored_gemm, hidden, weight, e, anchors, block_stats, every, count, config, grid)

    name = architecture(device)
    providers = {"cuBLAS": Provider(lambda: partial(torch.mm, hidden, weight.t(), out=z[:, :classes]))}
    for config in (GEMM_CONFIGS[name].forward, *CANDIDATES[name]):
        providers[repr(config)] = Provider(partial(fused, config))
    flops = 2.0 * rows * classes * width
    return Comparison(providers, "cuBLAS", flops=flops, graphs=False, dtype=torch.bfloat16)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[6272])
    parser.add_argument("--classes", type=int, nargs="+", default=[32768, 184622])
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repetitions", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("device must be a CUDA device for tuning, got none")
    budget = Budget(seconds=0.0, min_rounds=args.repetitions, max_rounds=args.repetitions, warmup=5)
    settings = Settings(torch.device("cuda", torch.cuda.current_device()), budget)
    for classes, width, rows in itertools.product(args.classes, args.width, args.rows):
        case = Case("tune", {"R": rows, "D": width, "V": classes}, partial(comparison, rows, classes, width))
        for row in run_case(case, settings):
            print(json.dumps(rounded(row)), flush=True)


if __name__ == "__main__":
    main()
