"""Packed rows and activation checkpointing: time of a training step and what it keeps for backward, before and after.

``python -m benchmarks.packing --output FILE``. Everything takes turns in one process with one thread; times are
processor time, ratios are taken within each round. Useful tokens are those of the sequences without padding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.environment import describe
from benchmarks.harness.timing import quartiles
from benchmarks.models import Size
from ntpseg.models import NTPSegModel
from ntpseg.training.dataset import Collator
from ntpseg.utils.files import write_json

# Text ids of a sample: a phrase of a finding, or anything from a phrase to a whole report.
TEXTS = {"phrases": (5, 25), "mixed": (8, 600)}
GRID, BATCH, BATCHES = 8, 16, 1


def samples(lengths: str, seed: int) -> tuple[Size, list[dict[str, Any]]]:
    """A size and one batch of samples whose text lengths are log-uniform."""
    size = Size("tiny", GRID, 64, batch=BATCH, heads=4, dtype="float32")
    sequence, rng = size.sequence(), np.random.default_rng(seed)
    low, high = TEXTS[lengths]
    made = []
    for index in range(BATCH):
        text = rng.integers(0, size.text, int(np.exp(rng.uniform(np.log(low), np.log(high)))))
        ids, labels = sequence.build(text.tolist(), *rng.integers(0, size.codes, (2, GRID, GRID)))
        made.append({"sample_ids": index, "input_ids": ids, "labels": labels})
    return size, made


def step_of(model: NTPSegModel, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """Forward, backward and AdamW for each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inputs = [{name: value for name, value in batch.items() if name != "sample_ids"} for batch in batches]

    def step() -> None:
        for batch in inputs:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def take_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each step in each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn:  # the first is for caches and allocations
                times[name].append(time.process_time() - start)
    return times


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles, as they stand in the result files."""
    found = {name: round(value, 4) for name, value in quartiles(values).items()}
    return {"median": found["median"], "quartiles": [found["p25"], found["p75"]]}


def packing(lengths: str, attention: str, rounds: int) -> dict[str, Any]:
    """The same batches padded and packed, with the same weights."""
    size, _ = samples(lengths, 0)
    made = [samples(lengths, seed)[1] for seed in range(BATCHES)]
    model = size.model(torch.device("cpu")).train()
    model.set_attn_implementation(attention)
    every = [len(sample["input_ids"]) for batch in made for sample in batch]
    row_length = 2 * max(every)
    batches = {
        name: [Collator(size.sequence(), grid_ids=False, packing=most)(batch) for batch in made]
        for name, most in {"padded": None, "packed": row_length}.items()
    }
    fields: dict[str, Any] = {
        "text_ids": TEXTS[lengths],
        "attention": attention,
        "row_length": row_length,
        "useful_tokens": sum(every),
        "decoder_tokens": {
            name: sum((b["packing"]["source"] if "packing" in b else b["input_ids"]).numel() for b in batch)
            for name, batch in batches.items()
        },
        "packed_batches": sum("packing" in batch for batch in batches["packed"]),
    }
    if fields["packed_batches"]:
        times = take_turns({name: step_of(model, batch) for name, batch in batches.items()}, rounds)
        fields["useful_tokens_per_second"] = {
            name: spread([sum(every) / seconds for seconds in values]) for name, values in times.items()
        }
        fields["speed_ratio"] = spread([a / b for a, b in zip(times["padded"], times["packed"], strict=True)])
    return fields


def kept_bytes(model: NTPSegModel, batch: dict[str, Any]) -> int:
    """What autograd keeps for backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**{name: value for name, value in batch.items() if name != "sample_ids"}).loss
    total = sum(storage.nbytes() for storage in held.values())
    del loss
    return total


def checkpointing(preset: str, rounds: int) -> dict[str, Any]:
    """One batch with and without, the same weights."""
    size = Size(preset, 14, 64, batch=2, heads=4, dtype="float32")
    ids, labels = size.batch_of(torch.device("cpu"))
    batch = {"input_ids": ids, "labels": labels}
    models = {}
    for name in ("off", "on"):
        models[name] = size.model(torch.device("cpu")).train()
        models[name].set_attn_implementation("causal_blocks")
    models["on"].activation_checkpointing_enable()
    kept = {name: kept_bytes(model, batch) for name, model in models.items()}
    times = take_turns({name: step_of(model, [batch]) for name, model in models.items()}, rounds)
    return {
        "preset": preset,
        "batch": list(ids.shape),
        "kept_bytes": kept,
        "memory_ratio": round(kept["on"] / kept["off"], 4),
        "time_ratio": spread([a / b for a, b in zip(times["on"], times["off"], strict=True)]),
    }


def main() -> None:
    """Measure all and write the file."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=7)
    args = options.parse_args()
    torch.set_num_threads(1)
    cases = [("phrases", "causal_blocks"), ("mixed", "causal_blocks"), ("mixed", "sdpa")]
    result = {
        "benchmark": "packing",
        "command": f"python -m benchmarks.packing --output FILE --rounds {args.rounds}",
        "model": f"tiny, k = 4, float32, grid {GRID} x {GRID}, {BATCHES} batches of {BATCH} sequences",
        "packing": [packing(*case, args.rounds) for case in cases],
        "activation_checkpointing": [checkpointing(preset, args.rounds) for preset in ("tiny", "small")],
        **describe(torch.device("cpu")),
    }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
