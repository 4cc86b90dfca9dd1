"""The benchmarks: a file each, with `cases(device, grid)`. To add one, write its file and list it here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """What the suite and the report say about a benchmark.

    Attributes:
        title: heading of its tables.
        gpu_goal: what it has yet to show on a GPU, in Markdown.
        gated: it has the grid "gate", cases with limits that the CPU paths promise.
    """

    title: str
    gpu_goal: str
    gated: bool = False


BENCHMARKS: dict[str, Benchmark] = {
    "loss": Benchmark(
        "Loss, forward and backward",
        "goals 1.03, 1.05 and 1.12 of three cuBLAS products at\n"
        "  D = 4096, 2048 and 1024; workspace, errors, bitwise repeatability and graph capture on the device; Liger,\n"
        "  cut-cross-entropy and QuACK beside it; the tile shapes of `ntpseg bench tune`",
        gated=True,
    ),
    "topn": Benchmark(
        "Ranking the hardest errors",
        "goals 4, 6 and 50 us; compute-sanitizer runs; rows of ties;\n  16 warps a row against 8 or 32 for few rows",
        gated=True,
    ),
    "attention": Benchmark("Causal attention, forward and backward", "every backend but PyTorch's own"),
    "decode": Benchmark("Decoding masks", "tokens per second"),
    "train": Benchmark("A whole training step", "tokens per second and model FLOPs utilisation"),
}
