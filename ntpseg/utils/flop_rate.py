"""The rate of matrix products on a device, measured there: what model FLOPs utilisation is a fraction of."""

from __future__ import annotations

import functools
import statistics
import time

import torch

_SECONDS, _ROUNDS = 0.3, (5, 50)


@functools.cache
def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product on random data (zeros would run faster than real data does).

    Measured once per device and dtype in a process, in about 0.3 s: the median of CUDA events on a GPU (8192 x 8192),
    the quickest of the rounds on a CPU (1024 x 1024, with PyTorch's threads), where other processes only slow it down.

    Args:
        device: where.
        dtype: of the operands; float32 products on CUDA use TF32 where that is allowed.
    """
    side = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        seconds: list[float] = []
        deadline = time.perf_counter() + _SECONDS
        while len(seconds) < _ROUNDS[0] or (len(seconds) < _ROUNDS[1] and time.perf_counter() < deadline):
            seconds.append(_product_seconds(a, b, out))
    return 2 * side**3 / (statistics.median(seconds) if device.type == "cuda" else min(seconds))


def _product_seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    if not a.is_cuda:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    torch.mm(a, b, out=out)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3
