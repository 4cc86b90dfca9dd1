"""What this machine has: versions, devices, usable backends, and the reason where one is not usable."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "deepspeed",
    "flash-attn",
    "xformers",
    "monai",
    "vector-quantize-pytorch",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
)


def describe() -> dict[str, dict[str, str]]:
    """Versions, devices and backends, each a name and one line; needs no GPU and imports nothing heavy but torch."""
    return {"versions": versions(), "devices": devices(), "backends": backends()}


def versions() -> dict[str, str]:
    """Versions of Python, ntpseg and what it works with; "not installed" where a package is missing."""
    import torch

    import ntpseg

    result = {"ntpseg": ntpseg.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "not installed"
    result["torch"] = torch.__version__  # PyPI's wheel leaves its build (+cu130) out of the metadata
    return result


def devices() -> dict[str, str]:
    """The CPU with the bfloat16 units that decide its speed, and every CUDA device."""
    import torch

    units = [
        name
        for name, supported in (
            ("AMX", torch.cpu._is_amx_tile_supported()),
            ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()),
            ("AVX512", torch.cpu._is_avx512_supported()),
            ("AVX2", torch.cpu._is_avx2_supported()),
        )
        if supported
    ]
    result = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {', '.join(units) or 'no AVX2'}"}
    if not torch.cuda.is_available():
        built = torch.version.cuda
        result["cuda"] = (
            "none: this PyTorch was built without CUDA" if built is None else f"none found (PyTorch for CUDA {built})"
        )
        return result
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        result[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    return result


def backends() -> dict[str, str]:
    """What `ntp_loss`, the ranking op, attention and ZeRO can use here."""
    result = {"loss reference": "usable", "loss torch": "usable", "loss triton": _triton()}
    import torch

    from ntpseg.ops import extension_status

    for line in extension_status().splitlines():
        device, _, detail = line.partition(": ")
        if (device, detail) == ("cuda", "native") and not torch.cuda.is_available():
            detail = "native, but there is no CUDA device"
        result[f"ranking op, {device}"] = detail
    result["attention sdpa, eager, causal_blocks"] = "usable"
    result["attention flash_attention_2"] = _module("flash_attn", cuda=True)
    result["attention flash_attention_3"] = _module("flash_attn_interface", cuda=True)
    result["xformers"] = _module("xformers", cuda=True)
    result["deepspeed ZeRO"] = _module("deepspeed", cuda=False)
    return result


def _triton() -> str:
    import torch

    return _usable(
        (
            lambda: None if importlib.util.find_spec("triton") else "triton is not installed",
            lambda: (
                None
                if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
                else "no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
            ),
        )
    )


def _module(name: str, *, cuda: bool) -> str:
    import torch

    return _usable(
        (
            lambda: None if importlib.util.find_spec(name) else f"{name} is not installed",
            lambda: "no CUDA device" if cuda and not torch.cuda.is_available() else None,
        )
    )


def _usable(conditions: tuple[Callable[[], str | None], ...]) -> str:
    for condition in conditions:
        reason = condition()
        if reason is not None:
            return f"not usable: {reason}"
    return "usable"
