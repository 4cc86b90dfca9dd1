"""What the machine decides: precision, threads of control, DeepSpeed's files and its traps on a CPU."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from ntpseg.training.config import CONFIGS

ZERO = ("zero1", "zero2", "zero3")


def resolve_bf16(value: Any = "auto") -> bool:
    """Whether to compute in bfloat16: "auto" where the hardware multiplies it (CUDA, or a CPU with AMX or AVX512-BF16).

    Raises:
        ValueError: `value` is neither "auto" nor a bool.
    """
    if isinstance(value, bool):
        return value
    if value != "auto":
        raise ValueError(f"training.bf16 is {value!r}, it must be auto, true or false")
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a training step frees and takes the same large blocks again and again.

    Returned to the kernel, every block would be mapped and zeroed anew, which took a third of a step on a CPU.
    Elsewhere than under glibc this does nothing.
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


def deepspeed_config(choice: str | None) -> dict[str, Any] | None:
    """The DeepSpeed configuration of a name (zero1, zero2, zero3) or of a JSON file; None for None.

    Raises:
        ValueError: neither, no valid JSON, or DeepSpeed is not installed.
    """
    if choice is None:
        return None
    path = CONFIGS / f"{choice}.json" if choice in ZERO else Path(choice).expanduser()
    if not path.is_file():
        raise ValueError(f"deepspeed is {choice!r}, it must be one of {', '.join(ZERO)} or the path of a JSON file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed: {path} is no valid JSON ({error})") from error
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ValueError(f"deepspeed is {choice!r}, but DeepSpeed is not installed (pip install deepspeed)") from error
    return config


def prepare_deepspeed() -> None:
    """Start DeepSpeed's process group; call it before `TrainingArguments`.

    On a CPU its shared-memory collectives would be compiled for minutes at the first start; gloo needs none. A run
    outside a launcher becomes a group of one.
    """
    import deepspeed

    # PyTorch names the successors of the collectives that DeepSpeed calls, at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    backend = "nccl"
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "gloo"
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in alone.items()})
    deepspeed.init_distributed(dist_backend=backend)


def end_processes() -> None:
    """Leave the process group; ranks that exit without it abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))
