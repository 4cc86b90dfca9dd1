"""Loading the native operators on first use, and saying what is usable where they are not.

``ntpseg._C`` defines the operators and their CPU implementations, ``ntpseg._C_cuda`` adds the CUDA ones. Both are
optional: without them every operator runs on plain PyTorch. NTPSEG_DISABLE_NATIVE=1 has the same effect.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor

_MODULES = {"cpu": "ntpseg._C", "cuda": "ntpseg._C_cuda"}
# Device type -> None where the native operators are usable, else the reason why they are not.
_reasons: dict[str, str | None] = {}


@torch.compiler.assume_constant_result
def usable(device_type: str) -> bool:
    """Tell whether the native operators serve tensors of this device type; loads them at the first call."""
    if device_type not in _MODULES:
        return False
    if device_type not in _reasons:
        _reasons[device_type] = _load(device_type)
    return _reasons[device_type] is None


def extension_status() -> str:
    """Say for each device whether its native operators are usable, and if not, why and what is used instead.

    Returns:
        One line per device, such as ``cpu: native`` or ``cuda: plain PyTorch (ntpseg._C_cuda was not built)``.
    """
    lines = []
    for device_type in _MODULES:
        detail = "native" if usable(device_type) else f"plain PyTorch ({_reasons[device_type]})"
        lines.append(f"{device_type}: {detail}")
    return "\n".join(lines)


def _load(device_type: str) -> str | None:
    if os.environ.get("NTPSEG_DISABLE_NATIVE") == "1":
        return "NTPSEG_DISABLE_NATIVE is set"
    if device_type == "cuda" and torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if device_type == "cuda" and not usable("cpu"):
        return _reasons["cpu"]
    module = _MODULES[device_type]
    if importlib.util.find_spec(module) is None:
        return f"{module} was not built"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} does not load: {error}"
    if device_type == "cpu":
        _register_fakes()
    return None


def _register_fakes() -> None:
    @torch.library.register_fake("ntpseg::topn_errors")
    def _(deviation: Tensor, is_error: Tensor, n: int) -> tuple[Tensor, Tensor]:
        shape = (deviation.shape[0], n)
        return deviation.new_empty(shape, dtype=torch.float32), deviation.new_empty(shape, dtype=torch.int32)

    # these write to their arguments and return nothing
    for name in ("record_errors", "merge_entries"):
        torch.library.register_fake(f"ntpseg::{name}", lambda *_: None)
