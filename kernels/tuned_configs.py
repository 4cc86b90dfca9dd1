"""The tile that `ntpseg bench tune` found best on this device, kept in the user's cache folder between runs.

A JSON file: ``{"format": 1, "choices": {DEVICE NAME: {TRITON VERSION: {"forward": {...}, ...}}}}``, the fields of
`GemmConfig` under "forward" and what it was measured with beside it. Whatever is damaged or of another version of the
package is passed over with one line in the log: a file in a cache folder must not keep a training from starting.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, ArchConfigs, GemmConfig, architecture
from ntpseg.utils import tuning_cache

FORMAT = 1
_logger = logging.getLogger("ntpseg.kernels")
# what a kernel can be compiled with: tiles are powers of two, warps whole warp groups
_ALLOWED: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K"), (16, 32, 64, 128, 256)),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": tuple(range(1, 9)),
    "EPILOGUE_SUBTILE": (1, 2, 4),
    "GROUP_SIZE_M": tuple(range(1, 129)),
    "ctas_per_sm": (1, 2, 3, 4),
}


def cache_file() -> Path:
    """``gemm.json`` in the user's cache folder, see `ntpseg.utils.tuning_cache.cache_file`."""
    return tuning_cache.cache_file("gemm.json")


def triton_version() -> str:
    """Of the installed package; another one makes other machine code of the same tile."""
    try:
        return version("triton")
    except PackageNotFoundError:
        import triton

        return triton.__version__


@cache
def configs_for(device: torch.device) -> ArchConfigs:
    """The entry of `GEMM_CONFIGS` for a device, with the forward tile that tuning chose there, if it did.

    Read once a process; never in the interpreter. The gradient filter
    must not use it: the tiles of its products follow the forward tile of the entry.

    Raises:
        ValueError: as `architecture`.
    """
    configs = GEMM_CONFIGS[architecture(device)]
    if device.type != "cuda":
        return configs
    forward = read_choice(torch.cuda.get_device_name(device), triton_version())
    return configs if forward is None else dataclasses.replace(configs, forward=forward)


def read_choice(device_name: str, triton: str) -> GemmConfig | None:
    """The forward product's tile for this device and version of Triton, None where there is none to be had.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        triton: see `triton_version`.
    """
    path = cache_file()
    try:
        content = _content(path)
        entry = content["choices"].get(device_name, {}).get(triton)
        return None if entry is None else _config(entry["forward"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        _logger.warning("%s must be a file that ntpseg bench tune wrote, ignored: %s", path, reason)
        return None


def save_choice(device_name: str, triton: str, config: GemmConfig | None, evidence: dict[str, Any]) -> Path:
    """Writes the choice into the file, under a temporary name that is then renamed; those of other devices stay.

    Args:
        device_name, triton: see `read_choice`.
        config: the tile; None removes the choice, for the built-in table's to be taken.
        evidence: shapes, ratios, date: anything that JSON holds.

    Returns:
        The file.

    Raises:
        OSError: the folder cannot be written to.
    """
    # triton kernels are imported without what the writing needs
    from ntpseg.utils.files import write_json

    path = cache_file()
    try:
        choices = _content(path)["choices"]
    except (OSError, ValueError):
        choices = {}  # a damaged file is replaced
    known = choices.get(device_name)
    versions = {**known} if isinstance(known, dict) else {}
    versions.pop(triton, None)
    if config is not None:
        versions[triton] = {"forward": dataclasses.asdict(config), **evidence}
    write_json(path, {"format": FORMAT, "choices": {**choices, device_name: versions}})
    return path


def _content(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("choices"), dict):
        raise ValueError(f"format must be {FORMAT}, with choices per device, got another file")
    return content


def _config(values: Any) -> GemmConfig:
    """A `GemmConfig` from its fields.

    Raises:
        ValueError: a field is unknown, missing, of the wrong type or no number that a tile can have.
    """
    if not isinstance(values, dict):
        raise ValueError(f"forward must be the fields of a tile, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(GemmConfig)}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"forward must have the fields of this version's GemmConfig, got {name!r}")
        if fields[name].type == "bool":
            right = isinstance(value, bool)
        else:
            right = isinstance(value, int) and not isinstance(value, bool) and value in _ALLOWED.get(name, (value,))
        if not right:
            raise ValueError(f"forward.{name} must be a value that a tile can have, got {value!r}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ValueError(f"forward must have {', '.join(missing)}, got none")
    return GemmConfig(**values)
