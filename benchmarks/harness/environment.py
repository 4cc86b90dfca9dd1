"""Where and on what a figure was taken: commit, device, driver, versions, clock state, load."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = (
    *("triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl"),
    *("flash-attn", "xformers"),
)
_SETTINGS = ("NTPSEG_CPU_ISA", "NTPSEG_DISABLE_NATIVE", "OMP_WAIT_POLICY")  # what changes a CPU's figures
_CLOCK_FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "throttle": "clocks_event_reasons.active",
}


def commit(root: Path = ROOT) -> str:
    """The short hash, with "+" where tracked files differ from it; "unknown" outside a checkout."""
    revision = _output(["git", "-C", str(root), "rev-parse", "--short", "HEAD"])
    if not revision:
        return os.environ.get("NTPSEG_COMMIT", "unknown")
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "-uno", "--", "ntpseg", "kernels", "csrc"])
    return revision + ("+" if changed else "")


@functools.cache
def describe(device: torch.device) -> dict[str, Any]:
    """What does not change during a run."""
    import ntpseg
    from ntpseg.ops import extension_status

    root = Path(ntpseg.__file__).resolve().parents[1]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ntpseg": ntpseg.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine = {"commit": commit(root), "device": device_name(device), "kind": device.type, "versions": versions}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return machine | {
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi(["driver_version"], device)[0] or "unknown",
            "capability": f"sm_{card.major}{card.minor}",
            "memory_bytes": card.total_memory,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    native = next((line for line in extension_status().splitlines() if line.startswith("cpu")), "")
    settings = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    return machine | {"driver": "none", "threads": torch.get_num_threads(), "native": native, "settings": settings}


def device_name(device: torch.device) -> str:
    """The name of the card, or of the processor with the instruction sets that matter here."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")), "CPU")
    return name + "".join(f", {flag}" for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text)


def slug(device: str) -> str:
    """A device's name in file names, without its instruction sets."""
    return re.sub(r"[^a-z0-9]+", "-", device.split(",")[0].lower()).strip("-")


def clock_state(device: torch.device) -> dict[str, Any]:
    """Clocks, power and temperature of the card right now; on a CPU the mean core clock and the load average."""
    state: dict[str, Any] = {"load": round(os.getloadavg()[0], 2)}
    if device.type == "cuda":
        values = _nvidia_smi(list(_CLOCK_FIELDS.values()), device)
        if values[0] is None:  # one name that this driver does not know fails them all
            values = [_nvidia_smi([name], device)[0] for name in _CLOCK_FIELDS.values()]
        return state | {name: value for name, value in zip(_CLOCK_FIELDS, values, strict=True) if value is not None}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return state
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return state | ({"cpu_mhz": round(sum(clocks) / len(clocks))} if clocks else {})


def _nvidia_smi(fields: Sequence[str], device: torch.device) -> list[Any]:
    # CUDA_VISIBLE_DEVICES renumbers cards for CUDA, not for nvidia-smi: the card is named by its own id.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    identity = f"GPU-{uuid}" if uuid else str(device.index or 0)
    text = _output(
        ["nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    )
    values = [value.strip() for value in text.split(",")] if text else []
    if len(values) != len(fields):
        return [None] * len(fields)
    return [_number(value) for value in values]


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text and text.count(".") == 1 else int(text)
    except ValueError:
        return text


def _output(command: Sequence[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
