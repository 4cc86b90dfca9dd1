"""Ranking the hardest errors: the native op, our plain PyTorch path, and the composition one would write by hand.

On a CPU against copies of the two inputs: ranking must read them once. On a GPU, where such short work is timed in CUDA
graphs, against the composition, which breaks ties as it likes and takes an error of deviation -inf for padding, so it
does a little less. With as many threads as cores, other load stops most calls for a scheduler's turn in the middle;
compare the least times then, or set OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, Comparison, Grid, Inaccurate, Provider, Settings
from ntpseg.ops import extension_status, topn_errors
from ntpseg.ops.topn import CUDA_MAX_LENGTH, CUDA_MAX_N, native_serves, plain_topn_errors

Ranked = tuple[Tensor, Tensor]

COMPOSED = "where + topk"
# B, T and n for which docs/kernels.md names a time on an H100.
GOALS = [(64, 4096, 64), (256, 4096, 128), (4096, 4096, 64)]
_FULL = list(itertools.product((8, 64), (256, 1568, 16384), (16, 64, 256), (0.13, 1.0)))
# Samples B, positions T, slots n and the rate of errors; 64 x 1568 with n = 64 is a training batch's.
GRIDS: dict[tuple[str, Grid], list[tuple[int, int, int, float]]] = {
    ("cpu", "quick"): [(4, 100, 8, 0.13)],
    ("cpu", "full"): _FULL,
    ("cpu", "gate"): list(
        itertools.product((1, 8, 64), (16, 256, 1568, 4096, 16384), (1, 16, 64, 256), (0.02, 0.13, 1.0))
    ),
    ("cuda", "quick"): [(64, 1568, 64, 0.13), *((*goal, 0.13) for goal in GOALS), (64, 8192, 256, 0.13)],
    ("cuda", "full"): [*_FULL, *((*goal, rate) for goal in GOALS for rate in (0.13, 1.0))],
}


def cases(device: torch.device, grid: Grid) -> Iterator[Case]:
    """Batches of deviations."""
    for point in GRIDS[device.type, grid]:
        parameters = dict(zip(("B", "T", "n", "errors"), point, strict=True))
        yield Case("topn", parameters, partial(_comparison, *point, grid == "gate"))


def _comparison(batch: int, length: int, n: int, error_rate: float, gate: bool, settings: Settings) -> Comparison:
    device = settings.device
    generator = torch.Generator(device).manual_seed(0)
    deviation = torch.rand(batch, length, device=device, generator=generator) * 10
    is_error = torch.rand(batch, length, device=device, generator=generator) < error_rate

    def check(step: Callable[[], Ranked]) -> dict[str, float]:
        value, index = step()
        ranked = torch.where(is_error, deviation, -torch.inf).double().sort(dim=1, descending=True, stable=True)
        kept = min(n, length)
        wrong = (value[:, :kept] != ranked.values[:, :kept]).sum()
        # by what stands at the index: equal deviations may be ordered either way by a hand-written composition
        filled = value[:, :kept] > -torch.inf
        at_index = deviation.gather(1, index[:, :kept].long().clamp_min(0))
        wrong += ((at_index != value[:, :kept]) & filled).sum() + ((index[:, :kept] >= 0) != filled).sum()
        if int(wrong):
            raise Inaccurate(
                {"entries": float(wrong)}, f"all {batch * n} entries must be right, got {int(wrong)} wrong"
            )
        return {"entries": 0.0}

    def provider(call: Callable[..., Ranked], computes: str, unavailable: str | None = None) -> Provider:
        return Provider(lambda: partial(call, deviation, is_error, n), check, unavailable, computes)

    native = None
    if device.type == "cuda" and (length > CUDA_MAX_LENGTH or n > CUDA_MAX_N):
        native = f"the CUDA kernels take T <= {CUDA_MAX_LENGTH} and n <= {CUDA_MAX_N}"
    elif not native_serves(device.type, length, n):
        native = next(line for line in extension_status().splitlines() if line.startswith(device.type))

    def copies() -> Callable[[], Any]:
        return lambda: (deviation.clone(), is_error.clone())

    providers = {
        "copies": Provider(copies, computes="no ranking at all"),
        "ntpseg native": provider(topn_errors, "ties to the lowest index", native),
        "ntpseg plain": provider(plain_topn_errors, "ties to the lowest index"),
        COMPOSED: provider(composition, "ties in any order"),
    }
    if gate:
        providers["ntpseg native"].limits = {COMPOSED: 1.0}
    return Comparison(
        providers,
        reference=COMPOSED if device.type == "cuda" else "copies",
        bytes=batch * (5.0 * length + 8.0 * n),
        tokens=batch * length,
    )


def composition(deviation: Tensor, is_error: Tensor, n: int) -> Ranked:
    """Mask, topk and padding by PyTorch's operators."""
    kept = min(n, deviation.shape[1])
    value, index = torch.where(is_error, deviation, -torch.inf).topk(kept, dim=1)
    index = torch.where(value == -torch.inf, -1, index).int()
    padding = (0, n - kept)
    return F.pad(value, padding, value=-torch.inf), F.pad(index, padding, value=-1)
