"""What the machine decides: the precision of matrix products, and how freed memory is kept on a CPU."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch


def resolve_bf16(value: Any = "auto") -> bool:
    """Whether to compute in bfloat16: "auto" where the hardware multiplies it (CUDA, or a CPU with AMX or AVX512-BF16).

    Raises:
        ValueError: `value` is neither "auto" nor a bool.
    """
    if isinstance(value, bool):
        return value
    if value != "auto":
        raise ValueError(f"training.bf16 must be auto, true or false, got {value!r}")
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a training step frees and takes the same large blocks again and again.

    Returned to the kernel, every block would be mapped and zeroed again, which took a third of a step on a CPU.
    Without glibc this does nothing.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for parameter, value in ((trim_threshold, 2**31 - 1), (mmap_threshold, 2**30), (top_pad, 2**26)):
        mallopt(parameter, value)
