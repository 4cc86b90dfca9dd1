"""What training steps send, counted by PyTorch's profiler on gloo ranks and beside it the prediction.

    python -m benchmarks.communication [--results FILE] [--cases CASE ...]

Runs `benchmarks.communication_steps` under torchrun with 2 and 4 ranks; what the file holds of other cases stays, each
with the commit that it was measured at. Exit code 1 where a number of calls or bytes is not the predicted one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import commit, describe
from benchmarks.harness.rows import RESULTS
from ntpseg.utils.files import write_json

_ROOT = Path(__file__).parents[1]
# DDP first: Hugging Face keeps DeepSpeed's settings for the rest of a process.
CASES = (
    "tiny,ddp",
    "tiny,ddp,accumulation=2",
    "tiny,ddp,dtype=bfloat16",
    "small,ddp",
    "tiny,fsdp2",
    "tiny,fsdp2,accumulation=2",
    "tiny,fsdp2,dtype=bfloat16",
    "tiny,fsdp2,checkpointing=1",
    "small,fsdp2",
    "het",
    "vocabulary",
    "tiny,zero1",
    "tiny,zero1,accumulation=2",
    "tiny,zero1,dtype=bfloat16",
    "small,zero1",
    "tiny,zero2",
    "tiny,zero2,accumulation=2",
    "tiny,zero2,dtype=bfloat16",
    "small,zero2",
    "tiny,zero3",
    "tiny,zero3,accumulation=2",
    "tiny,zero3,dtype=bfloat16",
    "tiny,zero3,checkpointing=1",
    # Limits that a small model reaches, as a large one does those of the shipped configuration.
    "tiny,zero3,max_live=1000000,max_reuse=1000000",
    "tiny,zero3,max_live=1000000,max_reuse=1000000,checkpointing=1",
    "tiny,zero3,max_live=0,max_reuse=0,checkpointing=1",
    "small,zero3",
    "small,zero3,max_live=10000000,max_reuse=5000000",
)


def run(ranks: int, cases: Sequence[str], timeout: float = 1800.0) -> list[dict[str, Any]]:
    """Rows of `benchmarks.communication_steps.compare`, one a case, all in the same processes.

    Raises:
        RuntimeError: a rank failed; with the end of what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(_ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += ["-m", "benchmarks.communication_steps", str(output), *cases]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(done.stderr[-6000:])
        rows: list[dict[str, Any]] = json.loads(output.read_text())
        return rows


def exact(row: dict[str, Any]) -> bool:
    """Every call was of a predicted kind and size, and none is missing."""
    return not row["only_measured"] and not row["only_predicted"]


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    kinds = ", ".join(
        f"{kind} {found['measured']['calls']} calls {found['measured']['bytes']:,} B"
        for kind, found in row["kinds"].items()
    )
    missed = "" if exact(row) else f"; not predicted: {row['only_measured']}, missing: {row['only_predicted']}"
    return f"{row['ranks']} ranks, {row['case']}: {kinds}{missed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all and write the file; 1 where a prediction was missed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=RESULTS / "communication_cpu.json")
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options.add_argument("--cases", nargs="+", default=CASES)
    args = options.parse_args(arguments)
    found: dict[tuple[int, str], dict[str, Any]] = {}
    if args.results.is_file():
        found = {(row["ranks"], row["case"]): row for row in json.loads(args.results.read_text())["rows"]}
    for ranks in args.ranks:
        for row in run(ranks, args.cases):
            print(line(row), flush=True)
            found[ranks, row["case"]] = {**row, "commit": commit()}
    rows = list(found.values())
    missed = sum(not exact(row) for row in rows)
    print(f"{len(rows) - missed} of {len(rows)} steps as predicted, call by call and byte by byte")
    result = {
        "benchmark": "communication",
        "command": "python -m benchmarks.communication",
        "source": "torch.profiler, record_shapes, gloo; see benchmarks/collectives.py",
        "exact": len(rows) - missed,
        "rows": rows,
        **{name: value for name, value in describe(torch.device("cpu")).items() if name != "commit"},
    }
    write_json(args.results, result)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
