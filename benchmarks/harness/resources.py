"""Registers and spills of a Triton kernel, read from its machine code; what a launch would compile, without it."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Resources:
    """Of one kernel.

    Attributes:
        registers: per thread; of the largest where the machine code holds several functions.
        stack, local: bytes per thread in memory; what does not fit into registers spills there.
    """

    registers: int
    stack: int
    local: int

    @property
    def spilled(self) -> int:
        """Bytes per thread."""
        return self.stack + self.local


@functools.lru_cache(maxsize=256)
def resource_usage(cubin: bytes) -> Resources:
    """Reads machine code with the cuobjdump that comes with Triton.

    Raises:
        RuntimeError: it says nothing that can be read.
    """
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    return parse_resource_usage(done.stdout + done.stderr)


def parse_resource_usage(text: str) -> Resources:
    """From the output of ``cuobjdump --dump-resource-usage``.

    Raises:
        RuntimeError: there is none in it.
    """
    found = {name: [int(value) for value in re.findall(rf"\b{name}:(\d+)", text)] for name in ("REG", "STACK", "LOCAL")}
    if not all(found.values()):
        raise RuntimeError(f"cuobjdump must print REG, STACK and LOCAL, got {' '.join(text.split())[-200:]!r}")
    return Resources(*(max(values) for values in found.values()))


def compiled_kernels(launch: Callable[[], Any]) -> list[Any]:
    """The Triton (and Gluon) kernels that `launch` would run on the current device, compiled as for it, not run.

    A later launch finds them in Triton's cache. Everything else that `launch` does is done.
    """
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with mock.patch.object(JITFunction, "run", compile_only):
        launch()
    return kernels
