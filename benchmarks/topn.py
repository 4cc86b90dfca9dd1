"""Ranking the hardest errors: the native op, our plain PyTorch path, and the composition one would write by hand.

On a CPU against copies of the two inputs: ranking must read them once. On a GPU, where such short work is timed in CUDA
graphs, against the composition (`topn_cpu.composition`), which breaks ties as it likes, so it does a little less.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Contest, Contestant, Settings, Wrong
from benchmarks.topn_cpu import composition
from ntpseg.ops import extension_status, topn_errors
from ntpseg.ops.topn import CUDA_MAX_LENGTH, CUDA_MAX_N, native_serves, plain_topn_errors

Ranked = tuple[Tensor, Tensor]


# B, T and n for which docs/kernels.md names a time on an H100.
GOALS = [(64, 4096, 64), (256, 4096, 128), (4096, 4096, 64)]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Samples B, positions T, slots n and the share of errors; 64 x 1568 with n = 64 is a training batch's."""
    if quick and device.type != "cuda":
        grid = [(4, 100, 8, 0.13)]
    elif quick:
        grid = [(64, 1568, 64, 0.13), *((*goal, 0.13) for goal in GOALS), (64, 8192, 256, 0.13)]
    else:
        grid = list(itertools.product((8, 64), (256, 1568, 16384), (16, 64, 256), (0.13, 1.0)))
        if device.type == "cuda":
            grid += [(*goal, share) for goal in GOALS for share in (0.13, 1.0)]
    for rows, length, slots, share in grid:
        parameters = {"B": rows, "T": length, "n": slots, "errors": share}
        yield Case("topn", parameters, lambda settings, g=(rows, length, slots, share): contest(*g, settings))


def contest(rows: int, length: int, slots: int, share: float, settings: Settings) -> Contest:
    """All contestants on one shape."""
    device = settings.device
    draw = torch.Generator(device).manual_seed(0)
    deviation = torch.rand(rows, length, device=device, generator=draw) * 10
    is_error = torch.rand(rows, length, device=device, generator=draw) < share

    def check(step: Callable[[], Ranked]) -> dict[str, float]:
        value, index = step()
        sorted_ = torch.where(is_error, deviation, -torch.inf).double().sort(dim=1, descending=True, stable=True)
        kept = min(slots, length)
        wrong = (value[:, :kept] != sorted_.values[:, :kept]).sum()
        # by what stands at the index: equal deviations may be ordered either way by a hand-written composition
        there = value[:, :kept] > -torch.inf
        found = deviation.gather(1, index[:, :kept].long().clamp_min(0))
        wrong += ((found != value[:, :kept]) & there).sum() + ((index[:, :kept] >= 0) != there).sum()
        if int(wrong):
            raise Wrong({"entries": float(wrong)}, f"{int(wrong)} of {rows * slots} entries are not right")
        return {"entries": 0.0}

    def contestant(call: Callable[..., Ranked], does: str, reason: str | None = None) -> Contestant:
        return Contestant(lambda: lambda: call(deviation, is_error, slots), check, reason, does)

    native = None
    if device.type == "cuda" and (length > CUDA_MAX_LENGTH or slots > CUDA_MAX_N):
        native = f"the CUDA kernels take T <= {CUDA_MAX_LENGTH} and n <= {CUDA_MAX_N}"
    elif not native_serves(device.type, length, slots):
        native = next(x for x in extension_status().splitlines() if x.startswith(device.type))

    def copies() -> Callable[[], Any]:
        return lambda: (deviation.clone(), is_error.clone())

    found = {
        "copies": Contestant(copies, does="no ranking at all"),
        "ntpseg native": contestant(topn_errors, "ties to the lowest index", native),
        "ntpseg plain": contestant(plain_topn_errors, "ties to the lowest index"),
        "where + topk": contestant(composition, "ties in any order"),
    }
    reference = "where + topk" if device.type == "cuda" else "copies"
    return Contest(found, reference=reference, bytes=rows * (5.0 * length + 8.0 * slots), tokens=rows * length)
