"""Jacobi decoding of a trained model against greedy: equal tokens, tokens per forward pass, time and memory.

``python -m benchmarks.jacobi RUN DATA --out benchmarks/results/jacobi_NAME.json``; without RUN and DATA a preset with
random weights. One thread; processor time, the methods in turns, the median of the ratios. Reading the prompt and the
stem count as part of decoding, encoding pixels does not.

``greedy_over_one_pass`` is the most that any draft could give: beside greedy one pass over the prompt and a whole mask.

Where two codes' logits are closer than rounding, passes of different shapes may choose differently, as greedy itself
may at another batch size. Such a row is counted under `ties`, not under `different`, and its gap is given.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.environment import describe
from benchmarks.models import Size
from ntpseg.generation import DecodingOptions, Generated, MaskGenerator
from ntpseg.utils.files import write_json

METHODS = ("greedy", "jacobi")
ONE_PASS = "one_pass"
# Logits of a float32 forward are this close to exact ones, relative to the largest.
ROUNDING = 1e-4
SENTENCES = 8


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 where a mask differs."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.jacobi", description=__doc__)
    options.add_argument("run", type=Path, nargs="?", help="a finished training")
    options.add_argument("data", type=Path, nargs="?", help="its data set")
    options.add_argument("--preset", default="small")
    options.add_argument("--masks", type=int, default=1000)
    options.add_argument("--timed", type=int, default=64, help="masks of the timings")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="of the comparison")
    options.add_argument("--out", type=Path)
    args = options.parse_args(arguments)
    torch.set_num_threads(1)
    if args.run is None:
        model, sequence, prompts, pixels = random_model(args.preset, args.masks)
    else:
        model, sequence, prompts, pixels = trained_model(args.run, args.data, args.masks)
    config = model.config
    report: dict[str, Any] = {
        "command": "python -m benchmarks.jacobi " + ("RUN DATA" if args.run else f"--preset {args.preset}"),
        **describe(torch.device("cpu")),
        "model": {
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads_k": config.num_heads_k,
            "front_end": config.front_end,
            "mask_grid": config.mask_grid,
        },
        "timings": [timing(model, sequence, prompts[: args.timed], pixels, size, args.repeats) for size in (1, 16)],
        "memory": memory(model, sequence, prompts, pixels),
        "sentences": [] if pixels is None else sentences(model, sequence, prompts, pixels, args.repeats),
        "identity": [identity(model, sequence, prompts, pixels, size) for size in args.batch_sizes],
    }
    print(json.dumps(report, indent=1))
    if args.out is not None:
        write_json(args.out, report)
    return int(any(row["different"] for row in report["identity"]))


def trained_model(run: Path, data: Path, masks: int) -> tuple[Any, Any, list[np.ndarray], np.ndarray | None]:
    """The model, its sequence format, prompts of evenly spread pairs of all splits, and their pixels."""
    from ntpseg.data import read_image
    from ntpseg.data.loading import inspect_dataset
    from ntpseg.generation import Segmenter
    from ntpseg.models import Bundle
    from ntpseg.tokenizers.text import encode_text

    bundle = Bundle.from_pretrained(run / "model" if (run / "model").exists() else run)
    records = inspect_dataset(data).records
    records = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, masks).astype(int))]
    encoded = Segmenter(bundle, DecodingOptions()).encode(read_image(record.image) for record in records)
    codes = [None] * len(records) if encoded.codes is None else encoded.codes
    prompts = [
        bundle.sequence.prompt(encode_text(bundle.text, record.text), code) for record, code in zip(records, codes)
    ]
    return bundle.model.eval(), bundle.sequence, prompts, encoded.pixels


def random_model(preset: str, masks: int) -> tuple[Any, Any, list[np.ndarray], None]:
    """A preset with random weights and random prompts: its drafts say nothing about a trained model."""
    size = Size(preset, 14, 256, batch=masks, heads=2, dtype="float32")
    ids, _ = size.batch_of(torch.device("cpu"))
    sequence = size.sequence()
    prompts = list(ids[:, : ids.shape[1] - sequence.num_target].numpy())
    return size.model(torch.device("cpu")).eval(), sequence, prompts, None


def decode(
    model: Any, sequence: Any, prompts: list[np.ndarray], pixels: np.ndarray | None, method: str, batch_size: int
) -> Generated:
    """All prompts; "one_pass" reads a mask of blanks once."""
    method, passes = ("refine", 0) if method == ONE_PASS else (method, 1)
    settings = DecodingOptions(method=method, passes=passes, dtype="float32", batch_size=batch_size)
    return MaskGenerator(model, sequence, settings)(
        prompts, pixel_values=None if pixels is None else pixels[: len(prompts)]
    )


def timing(
    model: Any, sequence: Any, prompts: list[np.ndarray], pixels: np.ndarray | None, batch_size: int, repeats: int
) -> dict[str, Any]:
    """Processor time of both methods in turns."""
    prompts = prompts[: max(batch_size, len(prompts) // 4)] if batch_size == 1 else prompts
    methods = (*METHODS, ONE_PASS) if (model.config.mask_inputs or {}).get("blank") else METHODS
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    results = {}
    for _ in range(repeats):
        for method in methods:
            started = time.process_time()
            results[method] = decode(model, sequence, prompts, pixels, method, batch_size)
            seconds[method].append(time.process_time() - started)
    ratios = [greedy / jacobi for greedy, jacobi in zip(seconds["greedy"], seconds["jacobi"])]
    bound = {}
    if ONE_PASS in methods:
        once = [greedy / one for greedy, one in zip(seconds["greedy"], seconds[ONE_PASS])]
        bound = {"greedy_over_one_pass": round(statistics.median(once), 2)}
    return {
        "batch_size": batch_size,
        "masks": len(prompts),
        **{f"{m}_ms_per_mask": round(1e3 * statistics.median(seconds[m]) / len(prompts), 2) for m in methods},
        "greedy_over_jacobi": round(statistics.median(ratios), 2),
        "greedy_over_jacobi_range": [round(min(ratios), 2), round(max(ratios), 2)],
        **bound,
        "passes_per_batch": round(results["jacobi"].steps, 2),
        "tokens_per_forward": round(sequence.mask_cells / results["jacobi"].steps, 1),
    }


def memory(model: Any, sequence: Any, prompts: list[np.ndarray], pixels: np.ndarray | None) -> dict[str, Any]:
    """The process's greatest resident set after 64 masks by greedy in one batch, and how far Jacobi then exceeds it."""
    peaks = []
    for method in METHODS:
        decode(model, sequence, prompts[:64], pixels, method, 64)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"greedy_mib": round(peaks[0]), "jacobi_over_greedy": round(peaks[1] / peaks[0], 3)}


def sentences(
    model: Any, sequence: Any, prompts: list[np.ndarray], pixels: np.ndarray, repeats: int
) -> list[dict[str, Any]]:
    """Processor time of several sentences on one image over that of one, in turns."""
    different = list({prompt.tobytes(): prompt for prompt in prompts}.values())[:SENTENCES]
    rows = []
    for method in METHODS:
        settings = DecodingOptions(method=method, dtype="float32", batch_size=SENTENCES)
        generator, ratios = MaskGenerator(model, sequence, settings), []
        for _ in range(repeats):
            times = []
            for chosen in ([[prompt] for prompt in different], [different]):
                started = time.process_time()
                for group in chosen:
                    generator(group, pixel_values=np.repeat(pixels[:1], len(group), 0))
                times.append((time.process_time() - started) / len(chosen))
            ratios.append(times[1] / times[0])
        row = {"method": method, "sentences": len(different), "over_one": round(statistics.median(ratios), 2)}
        rows.append(row | {"range": [round(min(ratios), 2), round(max(ratios), 2)]})
    return rows


def identity(
    model: Any, sequence: Any, prompts: list[np.ndarray], pixels: np.ndarray | None, batch_size: int
) -> dict[str, Any]:
    """How many masks differ, and at which gap between the two likeliest codes."""
    greedy, jacobi = (decode(model, sequence, prompts, pixels, method, batch_size) for method in METHODS)
    gaps = []
    for row in np.flatnonzero((greedy.codes != jacobi.codes).any((1, 2))):
        # Before the first difference both read the same: the two log-probabilities there are of one distribution.
        cell = int(np.argmax(greedy.codes[row].ravel() != jacobi.codes[row].ravel()))
        gaps.append(float(abs(greedy.logprob[row, cell] - jacobi.logprob[row, cell])))
    return {
        "batch_size": batch_size,
        "masks": len(prompts),
        "different": sum(gap > ROUNDING for gap in gaps),
        "ties": sum(gap <= ROUNDING for gap in gaps),
        "gaps": gaps,
        "largest_logprob_difference": float(np.abs(greedy.logprob - jacobi.logprob).max()) if not gaps else None,
    }


if __name__ == "__main__":
    sys.exit(main())
