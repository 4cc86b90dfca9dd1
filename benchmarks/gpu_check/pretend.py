"""A CUDA device that is not there, to rehearse a stage on a CPU: ``python -m benchmarks.gpu_check.pretend MODULE ...``.

Tensors "on cuda" lie on the CPU, Triton's kernels run in its interpreter, events read the clock of the host, a graph
runs when it is captured and replays nothing. So the tests and benchmarks run line by line, on shapes cut down to what
an interpreter can do; what they measure means nothing, and what only a device can get wrong stays unseen.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_GENERATOR = torch.Generator


def on_cpu(value: Any) -> Any:
    """The same with every CUDA device replaced; containers too."""
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return _CPU
    if type(value) in (tuple, list):
        return type(value)(on_cpu(item) for item in value)
    return value


class OnCpu(TorchFunctionMode):
    """Makes and moves on the CPU whatever is asked for on a CUDA device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # the name stays: what asks for it must find a CUDA device
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*(on_cpu(value) for value in args), **kwargs)


class _Generator(_GENERATOR):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, on_cpu(device))  # type: ignore[call-arg]


class _Event:
    def __init__(self, **_: Any) -> None:
        self.time = 0.0

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3

    def synchronize(self) -> None:
        """Nothing is under way."""

    wait = record

    def query(self) -> bool:
        return True


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        """Work is done when it is called."""

    def wait_stream(self, *_: Any) -> None:
        """Nothing is under way."""

    synchronize = wait_event = wait_stream

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


class _Graph:
    def replay(self) -> None:
        """What was captured ran when it was captured."""


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def install() -> None:
    """Replaces what PyTorch says of CUDA, for the rest of the process."""
    card = SimpleNamespace(
        name="pretended device",
        major=9,
        minor=0,
        multi_processor_count=4,
        total_memory=80 << 30,
        uuid=None,
    )
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: card.name,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: card,
        "synchronize": lambda *_: None,
        "mem_get_info": lambda *_: (64 << 30, 80 << 30),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda _: None,
        "get_sync_debug_mode": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "_sleep": lambda _: None,
        "Event": _Event,
        "Stream": _Stream,
        "CUDAGraph": _Graph,
        "graph": _nothing,
        "stream": _nothing,
        "device": _nothing,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Generator = _Generator  # type: ignore[misc]
    OnCpu().__enter__()  # until the process ends


def shrink() -> None:
    """Cuts the benchmarks' shapes for CUDA down to what an interpreter can do."""
    from benchmarks import attention, decode, loss, profile_loss, suite, topn, train
    from benchmarks.harness import timing
    from benchmarks.models import Size
    from benchmarks.operands import Shape

    timing._FLUSH_BYTES = 1 << 20
    suite.matmul_flops = lambda device, dtype: 1.0  # type: ignore[assignment]
    suite.copy_bytes = lambda device: 1.0  # type: ignore[assignment]
    loss.shapes = lambda device, grid: [Shape(200, 64, 300, 1, 5, "peaked"), Shape(120, 64, 300, 2, 5, "random")]
    profile_loss.shapes = lambda device, quick: [Shape(120, 64, 300)]
    topn.GRIDS["cuda", "quick"] = [(4, 300, 8, 0.13)]
    attention.GRIDS["cuda", "quick"] = [(1, 2, 64, 32, "bfloat16")]
    train.GRIDS["cuda", "quick"] = [Size("smallest", 4, 24, 64, batch=2)]
    decode.GRIDS["cuda", "quick"] = decode.GRIDS["cpu", "quick"]


def main() -> None:
    """Runs a module as ``python -m`` would, under the pretence."""
    install()
    if sys.argv[1].startswith("benchmarks"):
        shrink()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
