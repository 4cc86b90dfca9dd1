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

from benchmarks.harness import environment
from benchmarks.harness.rows import write

_FOLDER = Path(__file__).resolve().parents[1] / "examples"
RUNS = {
    **{f"causal_lm {name}": ("causal_lm.py", ["--model", name]) for name in ("llama", "qwen2", "qwen3", "emu3")},
    "llamagen_like": ("llamagen_like.py", []),
    "showo_like": ("showo_like.py", []),
}


def run(script: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """The figures of one example, without the curves but for their ends."""
    torch.set_num_threads(threads)
    sys.path.insert(0, str(_FOLDER))
    found = runpy.run_path(str(_FOLDER / script))["main"](arguments)
    curve = found["eager"]
    return {
        "steps": len(curve),
        "loss_first": curve[0],
        "loss_last": curve[-1],
        "difference": found["difference"],
        "eager_mb": round(found["eager_mb"], 1),
        "fused_mb": round(found["fused_mb"], 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), default=list(RUNS))
    parser.add_argument("--output", type=Path, default=environment.ROOT / "benchmarks" / "results" / "examples.json")
    settings = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in settings.only:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures = pool.apply(run, (*RUNS[name], settings.threads))
        rows.append({"example": name, **figures, **environment.describe(device), "threads": settings.threads})
        print(json.dumps({"example": name, **figures}), flush=True)
    write(settings.output, rows)


if __name__ == "__main__":
    main()
