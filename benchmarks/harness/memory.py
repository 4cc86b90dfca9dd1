"""Peak memory of one step: the allocator's on CUDA, the resident set's on a CPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(call: Callable[[], Any], device: torch.device) -> dict[str, Any] | None:
    """Peak bytes of one call beyond what was there before it (`delta`), and in all (`absolute`).

    What the call leaves behind (gradients) is part of the peak. On a CPU the absolute figure is the whole process.

    Args:
        call: one step of work that has run before, so that no library is loaded in it.
        device: where it runs.

    Returns:
        ``delta``, ``absolute`` and ``method``, or None where the operating system does not let the peak be reset.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return {"delta": peak - before, "absolute": peak, "method": "max_memory_allocated"}
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed blocks that the allocator still holds would hide in `before`
        _CLEAR.write_text("5")
        before = status_bytes("VmRSS")
        call()
        peak = status_bytes("VmHWM")
    except (OSError, AttributeError):
        return None
    return {"delta": max(peak - before, 0), "absolute": peak, "method": "resident set"}


def status_bytes(field: str) -> int:
    """A size of this process in bytes, by its name in Linux's ``/proc/self/status``, such as VmRSS.

    Raises:
        OSError: the system has no such file.
    """
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
