"""DeepSpeed and process groups: configurations by name, start and end, the rank of this process."""

from __future__ import annotations

import json
import os
import socket
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ntpseg.training.config import CONFIGS

# With _offload the optimizer, its state and step, is in the memory of the host.
ZERO_STAGES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def deepspeed_config(choice: str | None) -> dict[str, Any] | None:
    """The DeepSpeed configuration of a name of `ZERO_STAGES` or of a JSON file; None for None.

    Raises:
        ValueError: neither, invalid JSON, a setting that takes steps whose gradient is not finite, or DeepSpeed is not
            installed.
    """
    if choice is None:
        return None
    path = CONFIGS / f"{choice}.json" if choice in ZERO_STAGES else Path(choice).expanduser()
    if not path.is_file():
        names = ", ".join(ZERO_STAGES)
        raise ValueError(f"deepspeed must be one of {names}, or the path of a JSON file, got {choice!r}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed must be a file of valid JSON, got {path} ({error})") from error
    _check_skips(config, path)
    try:
        import deepspeed  # noqa: F401  # only to see that it is there
    except ImportError as error:
        raise ValueError(
            f"the package deepspeed must be installed for deepspeed={choice!r}, got none; run: pip install deepspeed"
        ) from error
    return config


def _check_skips(config: Any, path: Path) -> None:
    """Refuse what has DeepSpeed take a step whose gradient is not finite: the weights would be lost."""
    section = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    if stage not in (1, 2, 3):
        raise ValueError(
            f"deepspeed must have zero_optimization.stage 1, 2 or 3, got {stage!r} in {path}; without DeepSpeed "
            "training is that of stage 0 (DDP)"
        )
    bf16 = config.get("bf16")
    if isinstance(bf16, dict) and bf16.get("check_grad_overflow") is False:
        raise ValueError(f"deepspeed must leave bf16.check_grad_overflow on, got false in {path}")


def prepare_deepspeed() -> None:
    """Start DeepSpeed's process group; call it before `TrainingArguments`.

    On a CPU its shared-memory collectives would be compiled for minutes at the first start; gloo needs none. A run
    outside a launcher becomes a group of one.
    """
    import deepspeed

    # PyTorch warns of the deprecated collectives that DeepSpeed calls, at every call.
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
        single = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in single.items()})
    deepspeed.init_distributed(dist_backend=backend)


def renew_store() -> None:
    """After a restart by torchrun, have the ranks meet at a store of their own; all ranks call it before they meet.

    PyTorch 2.13 keeps one store for all restarts and does not tell their keys apart: a rank that comes first reads
    where the dead one of before had listened, and fails or waits for it.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # As long as a process group waits for its ranks: the first one may have large checkpoints to examine.
    agent = torch.distributed.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=30))
    store = torch.distributed.PrefixStore(f"ntpseg/attempt_{attempt}", agent)
    if rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            store.set("port", str(free.getsockname()[1]))
    os.environ.update({"MASTER_PORT": store.get("port").decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"})


def end_processes() -> None:
    """Leave the process group; ranks that exit without it abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))
