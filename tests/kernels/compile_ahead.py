"""Compiles every kernel that the launchers can choose, for one architecture, on a machine that needs no GPU.

Run as a script, in a process of its own: ahead-of-time compilation and Triton's interpreter exclude each other. It runs
the chunk loop with every launch replaced by a record of its arguments, so that what is compiled is what a GPU gets;
then compiles each distinct launch and prints one JSON line per kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ntpseg.kernels import chunks
from ntpseg.kernels.chunk_loop import LoopOptions, Segment, SegmentResult, run_segment
from ntpseg.kernels.compaction import BatchLayout, find_supervised, write_rows
from ntpseg.kernels.gather_scatter import gather_rows, gather_rows_dot, scatter_results, zero_missing_rows
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS
from ntpseg.kernels.hard_tokens import hard_token_table, rank_hard_tokens
from ntpseg.kernels.loss_terms import loss_terms
from ntpseg.kernels.scale_rows import scale_, scale_rows
from ntpseg.kernels.workspace import Anchors, LossWeights, RowStats

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_GIBIBYTE = 1 << 30
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def specialize(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the just-in-time compiler would key on: types, constants, alignment, options."""
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args)) | kwargs
    assert list(values) == kernel.arg_names, (kernel.__name__, list(values), kernel.arg_names)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[int] = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                aligned.append(parameter.num)
        elif isinstance(value, bool | int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if not parameter.do_not_specialize and value == 1:
                signature[name], constants[name] = "constexpr", 1
            elif not parameter.do_not_specialize and value % 16 == 0:
                aligned.append(parameter.num)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:  # a tensor descriptor
            element = _POINTERS[value.base.dtype][1:]
            signature[name] = f"tensordesc<{element}{[int(size) for size in value.block_shape]}>"
    return {"signature": signature, "constants": constants, "aligned": aligned, "options": options}


Launches = dict[str, tuple[JITFunction, dict[str, Any]]]


@contextlib.contextmanager
def recorded() -> Iterator[Launches]:
    """All distinct launches within, none of which is made."""
    distinct: Launches = {}

    def record(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        spec = specialize(self, args, dict(kwargs))
        distinct.setdefault(self.__name__ + json.dumps(spec, sort_keys=True), (self, spec))

    original, JITFunction.run = JITFunction.run, record
    try:
        yield distinct
    finally:
        JITFunction.run = original


def launches(architecture: str) -> list[tuple[JITFunction, dict[str, Any]]]:
    """All distinct launches of the chunk loop over dtypes, alignments and options."""
    with recorded() as distinct:
        launch_all(architecture)
    return list(distinct.values())


def launch_all(architecture: str) -> None:
    """Runs the chunk loop, and what is around it, over dtypes, alignments and options."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (128, 51):  # 51: rows that no wide load or descriptor can take
            for negatives, hard in ((5, 2), (32, 16)):
                for filtered in (0.0, 2.0**-12):
                    _run(dtype, width, negatives, hard, filtered, architecture)
        _run(dtype, 128, 5, 2, 0.0, architecture, classes=768)  # no vocabulary block is cut off
        _run_around(dtype)


def launches_by_start(architecture: str) -> list[list[str]]:
    """The distinct launches for rows that start at 0, 1, 2 and 3 of their arrays."""
    found = []
    for start in range(4):
        with recorded() as distinct:
            for dtype in (torch.bfloat16, torch.float32):
                for filtered in (0.0, 2.0**-12):
                    _run(dtype, 128, 5, 3, filtered, architecture, start=start)
        found.append(sorted(distinct))
    return found


def _run(
    dtype: torch.dtype,
    width: int,
    negatives: int,
    hard: int,
    filtered: float,
    architecture: str,
    classes: int = 640,
    start: int = 0,
) -> None:
    """Rows from `start` on of longer arrays, as the second head has them where each has a weight of its own."""
    rows = 160
    cut, longer = slice(start, None), rows + start
    result_dtype = torch.float32 if dtype == torch.float16 else dtype
    for grad, in_place in ((True, True), (True, False), (False, False)):
        segment = Segment(
            hidden=torch.zeros(longer, width, dtype=dtype)[cut],
            target=torch.zeros(longer, dtype=torch.int64)[cut],
            num_negatives=torch.zeros(longer, dtype=torch.int32)[cut],
            hard_tokens=torch.zeros(longer, hard, dtype=torch.int64)[cut],
            weights=LossWeights(torch.ones(longer)[cut], torch.ones(()), 1.0, 1.0, 0.5, 2.0),
            negatives=negatives,
            anchors=Anchors(*(torch.zeros(longer)[cut] for _ in range(3))) if in_place else None,
        )
        index = torch.arange(longer)[cut] if in_place else None
        d_hidden = torch.empty(longer, width, dtype=result_dtype) if grad else None
        result = SegmentResult(
            RowStats.empty(longer, torch.device("cpu"))[cut],
            torch.empty(longer)[cut],
            torch.empty(longer)[cut],
            d_hidden if in_place or d_hidden is None else d_hidden[cut],
            torch.empty(classes, width, dtype=result_dtype) if grad else None,
            index,
        )
        weight = torch.zeros(classes, width, dtype=dtype)
        several = 640 * dtype.itemsize * 128
        # one chunk, several that add up in fp32, several with a split accumulator, logits from a library product
        for chunk, workspace, fused in (
            (None, _GIBIBYTE, None),
            (several, _GIBIBYTE, None),
            (several, 1, None),
            (None, _GIBIBYTE, False),
        ):
            chunks.WORKSPACE_BYTES = workspace
            run_segment(segment, weight, result, LoopOptions(chunk, filtered, fused, GEMM_CONFIGS[architecture]))


def _run_around(dtype: torch.dtype) -> None:
    """What runs before and after the chunk loop."""
    layout = BatchLayout(heads=2, batch=3, time=40, shift=1, ignore_index=-100, class_start=0, classes=640)
    labels = torch.zeros(3, 40, dtype=torch.int64)
    hard = torch.zeros(3, 5, dtype=torch.int64)
    count = torch.ones(())
    rows = torch.ones(2, dtype=torch.float64)
    for weights, counts in ((None, (None, None)), (torch.ones(3, 40, dtype=dtype), (rows, rows[0]))):
        for signed in (False, True):
            cells = find_supervised(labels, weights, layout, *counts, signed_weights=signed)
        cell, rank = rank_hard_tokens(hard, hard, labels, cells, layout)
        for segments in (False, True):
            for per_head in (None, torch.ones(2)):
                for entries in (None, count):  # counted in the batch, as an integer among others, or given
                    made = write_rows(labels, cells, torch.ones(2), entries, per_head, layout, 5, 64, segments=segments)
        hard_token_table(hard, cell, rank, made.inverse_index, layout, 64, 2)
    for heads in (torch.zeros(3, 40, 2, 128, dtype=dtype), torch.zeros(2, 3, 40, 128, dtype=dtype).permute(1, 2, 0, 3)):
        gather_rows(heads, made.gather_index)
        for weight in (torch.zeros(640, 128, dtype=dtype), torch.zeros(2, 640, 128, dtype=dtype)):
            rows, _ = gather_rows_dot(heads, made.gather_index, weight, made.target, 48.0)
    gather_rows(rows, made.inverse_index)
    zero_missing_rows(rows, made.inverse_index)
    scale_rows(rows.float(), made.row_weight, rows, index=made.gather_index)
    scatter_results(made.inverse_index, made.index, made.row_weight, made.row_weight, (3, 40, 2), 1, 0)
    scale_(rows, count)
    terms = (made.ntp_weight, *(made.row_weight,) * 5)
    loss_terms(*terms, made.entry_weight, tcl_weight=1.0, het_weight=1.0, z_loss=0.5)


def compile_one(kernel: JITFunction, spec: dict[str, Any], capability: int, **extra: Any) -> dict[str, Any]:
    """Compiles one launch and reads its resources from the machine code."""
    attributes = {(index,): [["tt.divisibility", 16]] for index in spec["aligned"]}
    source = ASTSource(kernel, spec["signature"], constexprs=spec["constants"], attrs=attributes)
    options = spec["options"] | extra
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "operand": spec["signature"].get("hidden") or spec["signature"].get("e"),
        "constants": spec["constants"],
        "options": options,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "bulk_copies": ptx.count("cp.async.bulk.tensor"),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
    }


def main() -> None:
    """``compile_ahead.py sm_90 [starve | starts]``: starve caps registers, as proof that a spill would be seen; starts
    compiles nothing and prints the launches by the first row's place."""
    architecture = sys.argv[1]
    capability = int(architecture.removeprefix("sm_"))
    torch.set_num_threads(1)
    if sys.argv[2:] == ["starts"]:
        for found in launches_by_start(architecture):
            print(json.dumps(found), flush=True)
        return
    for kernel, spec in launches(architecture):
        if len(sys.argv) > 2:
            if kernel.__name__ == "anchored_gemm_kernel":
                print(json.dumps(compile_one(kernel, spec, capability, maxnreg=64)), flush=True)
                return
            continue
        print(json.dumps(compile_one(kernel, spec, capability)), flush=True)


if __name__ == "__main__":
    main()
