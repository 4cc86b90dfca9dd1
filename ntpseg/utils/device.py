"""From the name of a device to one that can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def usable_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name, tried out; without a name the GPU if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("it holds no values")
        torch.zeros(1, device=device)
    except Exception as error:  # PyTorch raises RuntimeError, AssertionError, NotImplementedError or its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        there = f"cpu or cuda (0 to {torch.cuda.device_count() - 1})" if torch.cuda.is_available() else "cpu"
        raise ValueError(
            f"device must be one of this machine's, {there}, got {str(name)!r} ({reason}); "
            "`ntpseg env` lists what is usable"
        ) from error
    return device
