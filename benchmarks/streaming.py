"""A packed data set against raw sequential reads of its shards, and against the folder it was packed from.

``python -m benchmarks.streaming --output FILE``. Everything takes turns in one process with one thread. "warm" is
processor time with the files in the system's cache: what reading costs besides the disk. "cold" is wall-clock time
after the system was told to drop them (``posix_fadvise``): the disk, and whoever else uses it. Ratios are within a
round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.harness.environment import describe
from benchmarks.packing import spread, take_turns
from ntpseg.data import Record, load_records
from ntpseg.data.shards import PackedSplit, open_packed
from ntpseg.data.shards.writing import PackOptions, pack_dataset
from ntpseg.tokenizers.packed import PackedPixels
from ntpseg.tokenizers.pixel_cache import PixelCache
from ntpseg.tokenizers.preprocess import preprocess
from ntpseg.utils.files import write_csv, write_json

SIDE, SIZE, DECODED = 512, 128, 24
FORMATS = ("parquet", "webdataset")
_CHUNK = 2**20


def write_folder(folder: Path, pairs: int) -> Path:
    """Grey pictures of smooth noise, whose PNG files are about as large as those of slices and X-rays."""
    rng, rows = np.random.default_rng(0), []
    folder.mkdir()
    for i in range(pairs):
        noise = Image.fromarray(rng.integers(0, 256, (SIDE, SIZE), dtype=np.uint8)).resize((SIDE, SIDE))
        noise.filter(ImageFilter.GaussianBlur(1)).save(folder / f"p{i}.png")
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[i % 200 : i % 200 + 250, 100:300] = 255
        Image.fromarray(mask).save(folder / f"m{i}.png")
        rows.append([f"p{i}.png", f"m{i}.png", f"The bright square {i % 9}.", "train"])
    write_csv(folder / "manifest.csv", ["image", "mask", "text", "split"], rows)
    return folder


def sequential(files: Sequence[Path]) -> None:
    """Read files from end to end."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass


def from_shards(split: PackedSplit, order: Sequence[int], step: int = 16) -> None:
    """Every pair's files, hashes checked, batch after batch as a data loader asks for them."""
    forget_contents(split)
    for start in range(0, len(order), step):
        batch = [int(i) for i in order[start : start + step]]
        split.prefetch(batch, ("image", "mask"))
        for row in batch:
            split.read(row, "image")
            split.read(row, "mask")


def forget_contents(split: PackedSplit) -> None:
    """Nothing of an earlier round may be at hand."""
    held = split._process.get()
    held.recent.clear()
    held.size = 0


def from_files(records: Sequence[Record], order: Sequence[int]) -> None:
    """The same of a folder, unchecked."""
    for i in order:
        assert records[i].mask is not None
        records[i].image.read_bytes()
        records[i].mask.read_bytes()  # type: ignore[union-attr]


def forget(files: Sequence[Path]) -> None:
    """Have the system drop what it holds of files."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cold(steps: dict[str, tuple[Callable[[], None], Sequence[Path]]], rounds: int) -> dict[str, list[float]]:
    """Wall-clock seconds of each step in each round, its files forgotten before."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (step, files) in steps.items():
            forget(files)
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: dict[str, list[float]], amount: float, unit: str, base: str) -> dict[str, Any]:
    """Rates, and times as multiples of those of `base`."""
    return {
        name: {
            unit: spread([amount / seconds for seconds in values]),
            f"time_over_{base}": spread([a / b for a, b in zip(values, times[base], strict=True)]),
        }
        for name, values in times.items()
    }


def measure(kind: str, folder: Path, work: Path, rounds: int) -> dict[str, Any]:
    """All of one format."""
    out = work / kind
    pack_dataset(folder, out, PackOptions(kind, shard_bytes=2**25))
    split, records = open_packed(out).splits["train"], load_records(folder)
    shards = [out / shard.name for shard in split.manifest.shards]
    files = [path for record in records for path in (record.image, record.mask) if path is not None]
    order = np.random.default_rng((0, 0)).permutation(len(split)).tolist()
    content = sum(path.stat().st_size for path in files)
    stored = sum(path.stat().st_size for path in shards)
    steps: dict[str, tuple[Callable[[], None], Sequence[Path]]] = {
        "sequential": (lambda: sequential(shards), shards),
        "shards_in_order": (lambda: from_shards(split, range(len(split))), shards),
        "shards_shuffled": (lambda: from_shards(split, order), shards),
        "folder_shuffled": (lambda: from_files(records, order), files),
    }
    chosen = order[:DECODED]
    packed = PackedPixels(split, SIZE, 1)
    cache = PixelCache.build(work / "cache", records, SIZE, 1, progress=False)

    def decoded(pair: Callable[[int], Any]) -> None:
        forget_contents(split)
        for i in chosen:
            pair(i)

    samples = {
        "folder": lambda: decoded(lambda i: preprocess(records[i], SIZE, 1)),
        "shards": lambda: decoded(packed.pair),
        "pixel_cache": lambda: decoded(cache.pair),
    }
    warm = take_turns({name: step for name, (step, _) in steps.items()}, rounds)
    return {
        "shards": len(shards),
        "stored_over_content": round(stored / content, 4),
        "warm_processor_time": summary(warm, content / 1e6, "MB_per_s", "sequential"),
        "cold_wall_clock": summary(cold(steps, rounds), content / 1e6, "MB_per_s", "sequential"),
        "decoded_processor_time": summary(take_turns(samples, rounds), DECODED, "samples_per_s", "folder"),
    }


def main() -> None:
    """Measure all and write the file."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--pairs", type=int, default=600)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = write_folder(Path(work, "folder"), args.pairs)
        size = sum(path.stat().st_size for path in folder.iterdir())
        result = {
            "benchmark": "streaming",
            "command": f"python -m benchmarks.streaming --output FILE --rounds {args.rounds} --pairs {args.pairs}",
            "data": f"{args.pairs} pairs of {SIDE}x{SIDE} PNG, {size / 1e6:.0f} MB; decoded to {SIZE}x{SIZE}",
            "formats": {kind: measure(kind, folder, Path(work), args.rounds) for kind in FORMATS},
            **describe(torch.device("cpu")),
        }
    write_json(args.output, result)


if __name__ == "__main__":
    main()
