"""Hard error tokens of many samples in mapped files: cost of a step, resident memory, disk, checkpoints, the index.

    python -m benchmarks.het_scale --samples 10000000 --out benchmarks/results/het_scale.json

Every sample is recorded once, each with as many errors as the memory keeps; then come the steps of two epochs, whose
batches are random: the second epoch writes where the file has holes, the third over rows of the first. The checkpoint
is of the second: what it serves, which is all, and what it recorded. Times are processor time of all threads of this
process, and wall time beside it, in which the disk's share shows. The folder is deleted.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.environment import describe
from benchmarks.harness.memory import status_bytes
from benchmarks.harness.rows import RESULTS, rounded
from benchmarks.harness.timing import quartiles
from benchmarks.models import Size
from ntpseg.memory import HardTokenMemory, KeyIndex
from ntpseg.utils.files import write_json
from ntpseg.utils.manifest import linked_hashes, write_manifest

_LENGTH = 256  # positions of a sample


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints each part's figures when it is done and writes all so far: what breaks off leaves what it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--entries", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--measured", type=int, default=200, help="batches of an epoch that are timed")
    parser.add_argument("--folder", type=Path, help="where the files lie; a temporary folder by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "het_scale.json")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.het_scale", *(sys.argv[1:] if arguments is None else arguments)]),
        "environment": describe(torch.device("cpu")),
        **{name: getattr(args, name) for name in ("samples", "entries", "batch", "measured")},
        "length": _LENGTH,
    }

    def say(name: str, figures: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(name, rounded(figures), f"(peak RSS {peak >> 10} MiB)", flush=True)
        result[name] = figures
        write_json(args.out, rounded(result))

    folder = Path(tempfile.mkdtemp(prefix="het-scale-", dir=args.folder))
    try:
        measure(args.samples, args.entries, args.batch, args.measured, folder, say)
    finally:
        shutil.rmtree(folder)
    print(args.out)


def measure(
    samples: int, entries: int, batch: int, measured: int, folder: Path, say: Callable[[str, Any], None]
) -> None:
    """The whole measurement in an empty folder, see the module's page; `say` gets the name and figures of each part."""
    start = resident()
    say("index", index_figures(samples, batch, folder / "index"))
    memory = HardTokenMemory(samples, entries, storage="mapped", path=folder / "memory")
    step = small_step()
    step_times = timed([step] * 5)
    say("small_step", {"sequences": 1, **step_times})
    del step
    peak = [0, 0]
    say("fill", fill(memory, batch, peak))
    say("disk_bytes", {p.name: 512 * p.stat().st_blocks for p in (folder / "memory").iterdir()})
    say("advance", wall(memory.advance))
    second = visits(memory, batch, measured, peak)
    say("epoch_2", second)
    say("checkpoint", checkpoints(memory, batch, folder, peak))
    memory.advance()
    say("epoch_3", visits(memory, batch, measured, peak))
    moments = {"at_start": start, "peak": peak}
    say(
        "resident_bytes",
        {f"{kind}_{when}": sizes[i] for when, sizes in moments.items() for i, kind in enumerate(("anonymous", "file"))},
    )
    say("share_of_small_step", (second["update"]["cpu_us"] + second["lookup"]["cpu_us"]) / step_times["cpu_us"])


def index_figures(samples: int, batch: int, folder: Path) -> dict[str, Any]:
    """Building an index of random keys and looking batches up."""
    index, generator, part = KeyIndex(folder, samples), np.random.default_rng(0), 1 << 18
    begin = time.process_time()
    for first in range(0, samples, part):
        index.add(generator.integers(0, 2**64, (min(part, samples - first), 2), dtype=np.uint64))
    build = (time.process_time() - begin) / samples * 1e6
    ids = torch.randint(samples, (200, batch))
    keys = [index.keys(row) for row in ids]
    looked = timed([partial(index.ids, key) for key in keys])
    if not all(torch.equal(index.ids(key), row) for key, row in zip(keys, ids)):
        raise ValueError("the index must find every key, got another sample")
    size = sum(512 * path.stat().st_blocks for path in folder.iterdir())
    return {"add_cpu_us": build, "lookup": per_sample(looked, batch), "disk_bytes": size}


def fill(memory: HardTokenMemory, batch: int, peak: list[int]) -> dict[str, float]:
    """Record every sample once, in the order of the file, in which that takes least."""
    made = errors(torch.arange(batch))

    def all_samples() -> None:
        for number, ids in enumerate(torch.arange(memory.num_samples).split(batch)):
            memory.record(ids, *(tensor[: len(ids)] for tensor in made[1:]))
            if number % 100 == 0:
                note_peak(peak)
        memory.wait()

    return wall(all_samples)


def _update(memory: HardTokenMemory, made: tuple[torch.Tensor, ...]) -> None:
    memory.record(*made)
    memory.wait()


def visits(memory: HardTokenMemory, batch: int, measured: int, peak: list[int]) -> dict[str, Any]:
    """What training steps do with the memory: look a random batch up and record its errors."""
    times: dict[str, list[tuple[float, float]]] = {"lookup": [], "update": []}
    for ids in torch.randperm(memory.num_samples)[: measured * batch].split(batch):
        made = errors(ids)
        times["lookup"].append(clock(partial(memory.lookup, ids)))
        times["update"].append(clock(partial(_update, memory, made)))
        note_peak(peak)
    return {name: per_sample(summary(found), batch) for name, found in times.items()}


def checkpoints(memory: HardTokenMemory, batch: int, folder: Path, peak: list[int]) -> dict[str, Any]:
    """A first checkpoint, which holds everything, and one after 100 more steps."""
    result: dict[str, Any] = {}
    for name in ("whole", "after_100_steps"):
        path, before = folder / name, disk(folder)
        seconds = wall(partial(memory.save, path / "hard_tokens_0.pt"))
        note_peak(peak)
        result[name] = {**seconds, "bytes_written": disk(folder) - before}
        known = linked_hashes(path, [folder / "whole"])
        result[name]["hash"] = wall(partial(write_manifest, path, known=known))
        if name == "whole":
            for ids in torch.randperm(memory.num_samples)[: 100 * batch].split(batch):
                memory.record(*errors(ids))
            memory.wait()
    return result


def note_peak(peak: list[int]) -> None:
    """Keep the larger of what is resident now and was before."""
    peak[:] = [max(a, b) for a, b in zip(peak, resident())]


def errors(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A batch in which every position is wrong."""
    size = (len(ids), _LENGTH)
    return ids, torch.randint(1, 1000, size), torch.zeros(size, dtype=torch.int64), torch.rand(size)


def small_step() -> Callable[[], None]:
    """Forward, loss and backward of one sequence of 12 x 12 image and mask tokens by the preset `small`."""
    size = Size("small", 12, 4096, batch=1, dtype="float32")
    model = size.model(torch.device("cpu"))
    ids, labels = size.batch_of(torch.device("cpu"))

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=labels)["loss"].backward()

    step()
    return step


def clock(call: Callable[[], Any]) -> tuple[float, float]:
    """Processor time of all threads and wall time of a call, in seconds."""
    cpu, begin = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - begin


def timed(calls: list[Callable[[], Any]]) -> dict[str, float]:
    """`summary` of calls, in microseconds."""
    return summary([clock(call) for call in calls])


def summary(times: list[tuple[float, float]]) -> dict[str, float]:
    """Median and quartiles of processor time, and the median of wall time, in microseconds."""
    cpu, real = ([1e6 * t for t in column] for column in zip(*times))
    found = quartiles(cpu)
    return {
        "cpu_us": found["median"],
        "cpu_us_low": found["p25"],
        "cpu_us_high": found["p75"],
        "wall_us": quartiles(real)["median"],
    }


def per_sample(times: dict[str, float], batch: int) -> dict[str, float]:
    """The times of a batch for one of its samples."""
    return {name: value / batch for name, value in times.items()}


def wall(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call: processor and wall."""
    cpu, real = clock(call)
    return {"cpu_seconds": cpu, "wall_seconds": real}


def resident() -> list[int]:
    """Bytes of this process that no file backs, and bytes of files that it maps."""
    return [status_bytes(name) for name in ("RssAnon", "RssFile")]


def disk(folder: Path) -> int:
    """Bytes on the disk under a folder, linked files once."""
    return sum({s.st_ino: 512 * s.st_blocks for s in (p.stat() for p in folder.rglob("*") if p.is_file())}.values())


if __name__ == "__main__":
    main()
