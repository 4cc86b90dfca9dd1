"""What images cost before the model: tokenising a set, and the share of a training step spent waiting for data.

    python -m benchmarks.input_pipeline DATA [--preset qata] [--output FILE]

Tokenising: `TokenCache.build` of the first images of a data set, with its loading threads against reading each image
when it is needed, and with ``Emu3VQVAE.encode`` as transformers has it; wall time of one process, in turns, a thread
for the products. The Emu3 tokenizer has random weights and a quarter of its channels (see `benchmarks.emu3_encoding`).

Training: ``ntpseg train PRESET`` with augmentation on, a run for each number of workers in turns; the log's own
``data_wait_share`` and step time, of the logs after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.emu3_encoding import _reference
from benchmarks.harness.environment import describe
from benchmarks.harness.rows import RESULTS, rounded
from benchmarks.harness.timing import quartiles, ratio_quartiles
from ntpseg.tokenizers import cache, emu3
from ntpseg.utils.files import write_json


def tokenising(data: Path, images: int, side: int, rounds: int) -> list[dict[str, Any]]:
    """Images a second before and after: without threads and with transformers' encoder, then either, then neither."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    from ntpseg.data import load_records
    from ntpseg.tokenizers.text import train_text_tokenizer

    records = [record for record in load_records(data) if record.split == "train"][:images]
    text = train_text_tokenizer([record.text for record in records], 300)
    torch.manual_seed(0)
    config = Emu3VQVAEConfig(base_channels=64, channel_multiplier=[1, 2, 2, 4], hidden_size=256, attn_resolutions=[3])
    vision = emu3.Emu3Vision(Emu3VQVAE(config), side)
    one_by_one = mock.patch.object(cache, "parallel_map", lambda function, items, prefetch: map(function, items))
    encoder = mock.patch.object(emu3, "encode_still", _reference)
    forms: dict[str, list[Any]] = {
        "before": [one_by_one, encoder],
        "loading threads": [encoder],
        "still images as one frame": [one_by_one],
        "both": [],
    }
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(rounds):
        for form, patches in forms.items():
            with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch)
                start = time.perf_counter()
                cache.TokenCache.build(folder, records, vision, text, progress=False)
                seconds[form].append(time.perf_counter() - start)
    rows = []
    for form, times in seconds.items():
        rows.append(
            {
                "form": form,
                "side": side,
                "images": len(records),
                "images_per_second": len(records) / statistics.median(times),
                "times_as_fast": ratio_quartiles(seconds["before"], times),
            }
        )
        print(rounded(rows[-1]), flush=True)
    return rows


def waiting(data: Path, preset: str, workers: list[int], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Share of a step spent waiting for the next batch, and its time, by the number of loading processes."""
    found: dict[int, list[dict[str, float]]] = {count: [] for count in workers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for count in workers:
                run = Path(folder) / "run"
                settings = {
                    "data.path": data,
                    "data.cache": Path(folder) / "cache",
                    "output": run,
                    "max_minutes": "null",
                    "training.max_steps": steps,
                    "training.logging_steps": steps // 4,
                    "training.dataloader_num_workers": count,
                }
                words = [f"{name}={value}" for name, value in settings.items()]
                command = [sys.executable, "-m", "ntpseg.cli", "train", preset, *words, "--overwrite"]
                subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                lines = map(json.loads, (run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines())
                found[count] += [log for log in lines if "data_wait_share" in log][1:]
    rows = []
    for count, logs in found.items():
        row: dict[str, Any] = {"preset": preset, "workers": count, "logs": len(logs)}
        for name in ("data_wait_share", "step_seconds"):
            row[name] = quartiles([log[name] for log in logs])
        rows.append(row)
        print(rounded(row), flush=True)
    return rows


def main() -> None:
    """Prints and writes ``input_pipeline.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--preset", default="qata")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "input_pipeline.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    content = {
        "tokenising": tokenising(args.data, args.images, args.side, args.rounds),
        "waiting": waiting(args.data, args.preset, args.workers, args.steps, args.rounds),
        "command": f"python -m benchmarks.input_pipeline DATA --preset {args.preset}",
    }
    write_json(args.output, rounded(content | describe(torch.device("cpu"))))


if __name__ == "__main__":
    main()
