"""Compiles the ping-pong product as its launcher would, on a machine that needs no GPU; one JSON line per kernel.

A script with a process of its own, for the same reason as `compile_ahead`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, native_specialize_impl

from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.gemm_configs import PINGPONG_CONFIGS, GemmConfig
from ntpseg.kernels.workspace import Anchors, BlockStats

CUOBJDUMP = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def specialize(kernel: JITFunction, args: tuple[Any, ...], constants: dict[str, Any]) -> dict[str, Any]:
    """What the just-in-time compiler would make of the arguments, by the function that it asks itself."""
    options = {"num_warps": constants.pop("num_warps")}
    signature: dict[str, str] = {}
    aligned: list[int] = []
    for parameter, arg in zip(kernel.params, args):
        value, place = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
        kind, key = native_specialize_impl(CUDABackend, arg, parameter.is_const, value, place)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = arg
        elif key is not None and "D" in key:
            aligned.append(parameter.num)
    signature |= {parameter.name: "constexpr" for parameter in kernel.params[len(args) :]}
    return {"signature": signature, "constants": constants, "aligned": aligned, "options": options}


def launches() -> list[tuple[JITFunction, dict[str, Any]]]:
    """All distinct launches: tiles, dtypes, a vocabulary of whole blocks or not; with a list of row blocks or not."""
    distinct: dict[str, tuple[JITFunction, dict[str, Any]]] = {}

    def record(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        spec = specialize(self, args, dict(kwargs))
        distinct.setdefault(json.dumps(spec, sort_keys=True), (self, spec))

    def launch(config: GemmConfig, dtype: torch.dtype, classes: int, *lists: torch.Tensor | None) -> None:
        rows, row = 160, torch.zeros(160)
        hidden, weight = torch.zeros(rows, 128, dtype=dtype), torch.zeros(classes, 128, dtype=dtype)
        stats = BlockStats.empty(-(-classes // config.BLOCK_N), rows, torch.device("cpu"))
        for e in (torch.zeros(rows, 640, dtype=dtype), None):
            for start in (0, 1):  # rows of a chunk start anywhere
                anchors = Anchors(row[start:], row[start:], row[start:])
                anchored_gemm(hidden[start:], weight, e, anchors, stats, *lists, config, 2)

    blocks, count = torch.zeros(3, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    original, JITFunction.run = JITFunction.run, record
    try:
        for config in PINGPONG_CONFIGS:
            for dtype in (torch.bfloat16, torch.float16):
                for classes in (512, 600):
                    launch(config, dtype, classes, blocks, count)
            launch(config, torch.bfloat16, 600, None, None)
    finally:
        JITFunction.run = original
    return list(distinct.values())


def releases(sass: str) -> list[int]:
    """Instructions between the end of each tile's products and the arrival that hands its last stage back."""
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    ends = [i for i, operation in enumerate(operations) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in operation]
    return [next(i for i in range(end, len(operations)) if "SYNCS.ARRIVE" in operations[i]) - end for end in ends]


def compile_one(kernel: JITFunction, spec: dict[str, Any]) -> dict[str, Any]:
    """Compiles one launch for sm_90a and reads its machine code."""
    attributes = {(index,): [["tt.divisibility", 16]] for index in spec["aligned"]}
    source = GluonASTSource(kernel, spec["signature"], constexprs=spec["constants"], attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=spec["options"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    ptx = compiled.asm["ptx"]
    return {
        "row_blocks": spec["signature"]["row_blocks_ptr"],
        "operand": spec["signature"]["hidden"],
        "constants": spec["constants"],
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "bulk_copies": ptx.count("cp.async.bulk.tensor"),
        "setmaxnreg": ptx.count("setmaxnreg"),
        "releases": releases(sass),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kernel, spec in launches():
        print(json.dumps(compile_one(kernel, spec)), flush=True)
