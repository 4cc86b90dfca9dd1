"""Checks of arguments that are tensors, with errors in the grammar of `ntpseg.utils.checks`.

Every wrong argument is a `ValueError`, also one of the wrong type: a caller who asks for one kind of error gets all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_KINDS: dict[str, tuple[str, Callable[[torch.dtype], bool]]] = {
    "float": ("a float", lambda dtype: dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "int64": ("an int64", lambda dtype: dtype == torch.int64),
    "integer": ("an int64", lambda dtype: dtype in (torch.int64, torch.int32)),
    "bool": ("a bool", lambda dtype: dtype == torch.bool),
}


def check_tensor(name: str, value: Any, kind: str, *shapes: tuple[int | str, ...]) -> None:
    """Raise a `ValueError` unless `value` is a strided tensor of this kind in one of these shapes.

    Reads no element: it costs the same for every size and device, and can be traced.

    Args:
        name: the argument, as the user knows it.
        value: its value.
        kind: "float" (float64, float32, bfloat16 or float16), "int64", "integer" (int64 or, silently, int32) or "bool".
        shapes: sizes; a name, such as "T", stands for any number.
    """
    article, holds = _KINDS[kind]
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and holds(value.dtype):
        for shape in shapes:
            if _fits(value, shape):
                return
    wanted = " or ".join(["[" + ", ".join([str(size) for size in shape]) + "]" for shape in shapes])
    raise ValueError(f"{name} must be {article} {wanted} tensor, got {shown(value)}")


def check_device(name: str, value: Tensor, other: str, device: torch.device) -> None:
    """Raise a `ValueError` unless `value` is on `device`, which is that of the argument `other`."""
    if value.device != device:
        raise ValueError(f"{name} must be on the device of {other} ({device}), got {value.device}")


def shown(value: Any) -> str:
    """Dtype and shape of a tensor, the type of anything else, for an error message in one line."""
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
    return f"{layout}{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def has_data(value: Tensor) -> bool:
    """Whether there are elements to look at: not while tracing, nor on the meta device."""
    if torch.compiler.is_compiling() or value.device.type == "meta":
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(value, FakeTensor)


def readable(value: Tensor) -> bool:
    """Whether the host can look at the elements without waiting for a device."""
    return value.device.type == "cpu" and has_data(value)


def _fits(value: Tensor, shape: tuple[int | str, ...]) -> bool:
    if value.dim() != len(shape):
        return False
    return all([isinstance(size, str) or value.shape[i] == size for i, size in enumerate(shape)])
