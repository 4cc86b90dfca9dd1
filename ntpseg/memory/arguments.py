"""What a hard-token memory may be made with and given; each error is a `ValueError` of one line."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ntpseg.memory import deviation as deviations
from ntpseg.memory import storage
from ntpseg.ops.topn import MAX_N
from ntpseg.utils.checks import brief, check_choice, check_integer

MAX_TOKEN = 2**31 - 1  # entries are int32


def check_real(name: str, tensor: Tensor) -> None:
    """Refuse tensors without data."""
    if tensor.device.type == "meta":
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")


def check_largest(token: int) -> None:
    """Refuse tokens that an entry cannot hold."""
    if token > MAX_TOKEN:
        raise ValueError(f"prediction must be below 2**31, got {token}")


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of a memory: the CPU for None; one that is not here, or holds no data, is refused."""
    try:
        chosen = torch.device("cpu" if device is None else device)
        torch.empty(0, device=chosen)  # one that is named well may still not be here
    except (AssertionError, NotImplementedError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device must be one that PyTorch can use here, got {brief(device)}") from error
    if chosen.type == "meta":
        raise ValueError("device must be one that holds data, got 'meta'")
    return chosen


def check_options(
    num_samples: int, n: int, kind: str, path: str | Path | None, deviation: str, ignore_index: int
) -> None:
    """Refuse what no memory can be made with, see `ntpseg.HardTokenMemory`."""
    check_integer("num_samples", num_samples, 1)
    check_integer("n", n, 1, MAX_N)
    check_integer("ignore_index", ignore_index, -(2**63))
    check_choice("storage", kind, storage.KINDS)
    check_choice("deviation", deviation, deviations.KINDS)
    if not (isinstance(path, str | Path) if kind == "mapped" else path is None):
        raise ValueError(f"path must be a folder for storage 'mapped' and None for any other, got {brief(path)}")
