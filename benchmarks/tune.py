"""Times the forward product's candidates on this machine's GPU against cuBLAS: ``python -m benchmarks.tune``.

Prints one JSON line per shape and candidate: the median over interleaved repetitions of (candidate) / (cuBLAS product
of the same operands, bf16 out), which carries the epilogue's cost too. The winner goes into
`ntpseg.kernels.gemm_configs` by hand, with its line as evidence.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict

import torch

from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, GemmConfig, architecture, persistent_grid
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
    ),
    "sm_100": (
        GemmConfig(128, 128, 64, num_warps=8, num_stages=4, TMA=True),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=5, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=2),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, EPILOGUE_SUBTILE=4),
    ),
}


_HEAD_START_CYCLES = 1_000_000


def milliseconds(run: Callable[[], object]) -> float:
    """One call, by events, behind enough work that its launch has reached the device before it starts."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(config: GemmConfig, rows: int, classes: int, width: int, repetitions: int) -> dict[str, float]:
    """Median ratio to cuBLAS and median milliseconds of both."""
    device = torch.device("cuda")
    hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(classes, width, device=device, dtype=torch.bfloat16) * width**-0.5
    target_logit = torch.zeros(rows, device=device)
    anchors = Anchors(target_logit, target_logit.clone(), target_logit + 48.0)
    block_stats = BlockStats.empty(-(-classes // config.BLOCK_N), rows, device)
    stride = -(-classes // 64) * 64
    e, z = torch.empty(2, rows, stride, device=device, dtype=torch.bfloat16)
    blocks = -(-rows // config.BLOCK_M)
    every = torch.arange(blocks, dtype=torch.int32, device=device)
    count = torch.full((), blocks, dtype=torch.int32, device=device)
    grid = persistent_grid(config, blocks * block_stats.row_sum.shape[0], device)

    def ours() -> None:
        anchored_gemm(hidden, weight, e, anchors, block_stats, every, count, config, grid)

    def library() -> None:
        torch.mm(hidden, weight.t(), out=z[:, :classes])

    for _ in range(5):
        ours()
        library()
    pairs = [(milliseconds(ours), milliseconds(library)) for _ in range(repetitions)]
    return {
        "ratio": statistics.median(a / b for a, b in pairs),
        "ours_ms": statistics.median(a for a, _ in pairs),
        "cublas_ms": statistics.median(b for _, b in pairs),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[6272])
    parser.add_argument("--classes", type=int, nargs="+", default=[32768, 184622])
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repetitions", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device")
    name = architecture(torch.device("cuda"))
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for classes in options.classes:
        for width in options.width:
            for rows in options.rows:
                for config in (GEMM_CONFIGS[name].forward, *CANDIDATES[name]):
                    shape = {"rows": rows, "classes": classes, "width": width}
                    found = measure(config, rows, classes, width, options.repetitions)
                    print(json.dumps(machine | shape | found | {"config": asdict(config)}), flush=True)


if __name__ == "__main__":
    main()
