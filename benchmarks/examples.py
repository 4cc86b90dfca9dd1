"""What the examples measure: loss curves with a model's own loss and with ours, and the peak memory of both.

    python -m benchmarks.examples [--threads 1] [--output FILE]

Each example runs as its user would run it, at its defaults, in a process of its own: memory that a training frees may
stay with its process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import ROOT, describe
from benchmarks.harness.rows import RESULTS, write

_FOLDER = ROOT / "examples"
RUNS = {
    **{f"causal_lm {name}": ("causal_lm.py", ["--model", name]) for name in ("llama", "qwen2", "qwen3", "emu3")},
    "llamagen_like": ("llamagen_like.py", []),
    "showo_like": ("showo_like.py", []),
}


def run(script: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """The figures of one example, without the curves but for their ends."""
    torch.set_num_threads(threads)
    sys.path.insert(0, str(_FOLDER))
    result = runpy.run_path(str(_FOLDER / script))["main"](arguments)
    curve = result["eager"]
    return {
        "steps": len(curve),
        "loss_first": curve[0],
        "loss_last": curve[-1],
        "difference": result["difference"],
        "eager_mb": round(result["eager_mb"], 1),
        "fused_mb": round(result["fused_mb"], 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Loss curves and peak memory of the examples.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), default=list(RUNS))
    parser.add_argument("--output", type=Path, default=RESULTS / "examples.json")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in args.only:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures = pool.apply(run, (*RUNS[name], args.threads))
        rows.append({"example": name, **figures, **describe(device), "threads": args.threads})
        print(json.dumps({"example": name, **figures}), flush=True)
    write(args.output, rows)


if __name__ == "__main__":
    main()
