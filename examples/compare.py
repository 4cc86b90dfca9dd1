"""Trains a model twice, with its own loss and with ours, and compares loss curve and peak memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def fit(optimizer: torch.optim.Optimizer, loss_function: Callable[[], Tensor], steps: int) -> list[float]:
    """Trains for some steps and returns their losses; `loss_function` draws its own batch."""
    losses = []
    for _ in range(steps):
        loss = loss_function()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def peak_megabytes(function: Callable[[], list[float]], device: torch.device) -> tuple[list[float], float]:
    """Runs `function` and returns its result and the peak memory it added: of the GPU, else of the process (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # makes the present resident set the peak so far
    before = _resident("VmRSS")
    result = function()
    return result, _resident("VmHWM") - before


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def compare(eager: Callable[[], list[float]], fused: Callable[[], list[float]], device: torch.device) -> dict:
    """Runs both trainings and prints their curves; the fused one first, as freed memory may stay with the process.

    Args:
        eager, fused: each trains from the same start on the same data and returns its losses, step by step.
        device: where they run.

    Returns:
        ``eager`` and ``fused`` curves, their largest ``difference`` and both peaks in MB.
    """
    curve, peak = peak_megabytes(fused, device)
    expected, expected_peak = peak_megabytes(eager, device)
    difference = max(abs(a - b) for a, b in zip(expected, curve, strict=True))
    print(f"{'step':>4} {'own loss':>10} {'ntp_loss':>10}")
    for step in sorted({*range(0, len(curve), max(len(curve) // 5, 1)), len(curve) - 1}):
        print(f"{step:>4} {expected[step]:>10.5f} {curve[step]:>10.5f}")
    print(f"largest difference {difference:.2e}; peak memory {expected_peak:.0f} MB -> {peak:.0f} MB")
    return {
        "eager": expected,
        "fused": curve,
        "difference": difference,
        "eager_mb": expected_peak,
        "fused_mb": peak,
    }
