"""What `benchmarks.tune` reads of a candidate before it launches it, with a driver that only names a Hopper GPU.

Run as a script, in a process of its own: ahead-of-time compilation and Triton's interpreter exclude each other. Prints
one JSON line for the tile in use, and one for the same with its registers capped.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks import tune
from benchmarks.harness.resources import compiled_kernels, resource_usage


class Hopper:
    """A driver without a device."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver.set_active(Hopper())
    operands = tune.Operands.random(256, 512, 128, torch.device("cpu"))
    product = tune.ForwardProduct(operands, tune.GEMM_CONFIGS["sm_90"].forward)
    run = JITFunction.run

    def starved(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs, maxnreg=160)

    for variant in (run, starved):
        JITFunction.run = variant
        (kernel,) = compiled_kernels(product)
        print(json.dumps(asdict(resource_usage(kernel.asm["cubin"]))), flush=True)


if __name__ == "__main__":
    main()
