"""What the pickles of a checkpoint may call: data, and a few classes by name.

A pickle can run any command when it is read. DeepSpeed and PyTorch's sharded checkpoints read theirs without
restraint, so each is searched first, and then read as weights only.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

# What the Trainer, NumPy's random state and DeepSpeed's optimizers save, beyond what PyTorch allows by itself.
ALLOWED = (
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# The index of a sharded checkpoint, a plain pickle.
_INDEX = ".metadata"
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_INDEX_NAMES = (
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
)
_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
# Written by releases before 0.2, and never read.
NEVER_READ = "training_args.bin"


def find_unsafe(checkpoint: Path) -> str | None:
    """What a checkpoint holds that is not to be read, in one line; None where there is nothing.

    Nothing is executed: the calls are read from the pickles, and compared with `ALLOWED`.
    """
    for root, folders, files in os.walk(checkpoint):
        for name in folders:
            if Path(root, name).is_symlink():
                return f"{name} is a link to another folder"
        for name in sorted(files):
            path = Path(root, name)
            if (name == _INDEX or path.suffix in _SUFFIXES) and name != NEVER_READ:
                wrong = _search_index(path) if name == _INDEX else _search(path)
                if wrong is not None:
                    return f"{path.relative_to(checkpoint).as_posix()} {wrong}"
    latest = checkpoint / "latest"
    # DeepSpeed reads the folder that this file names.
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(name).name != name or not (checkpoint / name).is_dir():
            return f"latest must name a folder of the checkpoint, got {name[:80]!r}"
    return None


@contextmanager
def weights_only() -> Iterator[None]:
    """A block in which every ``torch.load``, DeepSpeed's too, reads data and the classes of `ALLOWED` alone."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals(_classes()):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _search(path: Path) -> str | None:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:  # a damaged pickle can raise anything
        return f"cannot be read as data ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    calls = sorted(set(found) - set(ALLOWED))
    return f"calls {calls[0]}, which no checkpoint needs" if calls else None


class _Inert:
    """Stands for every object of an index, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """As a list's."""

    def extend(self, _: Any) -> None:
        """As a list's."""


class _Search(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = (module, name) in _INDEX_NAMES or (module in _INDEX_MODULES and "." not in name)
        if not allowed and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise PermissionError(f"{module}.{name}")
        return _Inert


def _search_index(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            index = _Search(file).load()
    except PermissionError as error:
        return f"calls {error}, which no checkpoint needs"
    except Exception as error:  # a damaged pickle can raise anything
        return f"cannot be read as data ({type(error).__name__})"
    return None if isinstance(index, _Inert) else "is no index of a sharded checkpoint"


def _classes() -> list[Any]:
    """The classes of `ALLOWED` that are installed."""
    found = []
    for name in ALLOWED:
        module, _, attribute = name.rpartition(".")
        # Importing DeepSpeed takes seconds; a run that it trains has done so.
        if name.startswith("deepspeed.") and "deepspeed" not in sys.modules:
            continue
        try:
            found.append((getattr(import_module(module), attribute), name))
        except (ImportError, AttributeError):
            continue
    return found
