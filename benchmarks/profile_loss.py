"""Which kernels the loss spends its time in, and where the device waits: torch.profiler, and Nsight Compute (ncu).

    python -m benchmarks.profile_loss [--quick] [--no-ncu] [--device cpu] [--results DIR]

ncu measures one step, started by this same script with ``--once``; it reads throughputs of the whole chip in percent of
their peak, and leaves the clocks as they are.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import clock_state, describe
from benchmarks.harness.rows import RESULTS, rounded
from benchmarks.loss import ours
from benchmarks.operands import Operands, Shape
from ntpseg.utils.files import write_json

_STEPS = 5
_HEAD_START_CYCLES = 20_000_000  # about ten milliseconds: launching is slower under the profiler
_METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
}
_NCU_SECONDS = {True: 22.0, False: 120.0}  # for one shape, quick or not


def shapes(device: torch.device, quick: bool) -> list[Shape]:
    """What is profiled."""
    if device.type != "cuda":
        return [Shape(64, 32, 300, dtype="float32")] if quick else [Shape(1568, 512, 32768, dtype="float32")]
    small = [Shape(6272, width, 32768) for width in (1024, 2048, 4096)]
    return small if quick else [*small, Shape(6272, 4096, 184622)]


def kernels(step: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Time per kernel (per operator on a CPU) of one step, the longest first, as torch.profiler sees it."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    step()
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(_STEPS):
            step()
        if cuda:
            torch.cuda.synchronize(device)
    rows = []
    for item in profiler.key_averages():
        if (item.device_type != torch.autograd.DeviceType.CPU) != cuda:
            continue
        seconds = (item.self_device_time_total if cuda else item.self_cpu_time_total) / 1e6 / _STEPS
        rows.append({"kernel": item.key[:160], "calls": item.count / _STEPS, "seconds": seconds})
    total = sum(row["seconds"] for row in rows) or 1.0
    rows.sort(key=lambda row: -row["seconds"])
    return [{**row, "share": row["seconds"] / total} for row in rows if row["seconds"] > 0][:30]


def timeline(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """What ran on a CUDA device in one step, in order, and how long it idled between; microseconds.

    The step starts behind other work, as it does in training, so that the host is ahead of the device; what idles then
    waits for a synchronisation, or for launches that take longer than the kernels before them.
    """
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_STEPS):
            torch.cuda._sleep(_HEAD_START_CYCLES)
            step()
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type != torch.autograd.DeviceType.CPU
    ]
    spans.sort()
    starts = [index for index, span in enumerate(spans) if "spin_kernel" in span[2]]
    if not starts:
        return {"unavailable": "the profiler saw no kernel"}
    last = spans[starts[-1] + 1 :]
    if not last:
        return {"unavailable": "the profiler saw no kernel after the head start"}
    launches, end = [], spans[starts[-1]][1]
    begin = end
    for start, stop, name in last:
        idle = max(start - end, 0)
        launches.append({"at": start - begin, "idle_before": idle, "takes": stop - start, "kernel": name[:120]})
        end = max(end, stop)
    busy = sum(item["takes"] for item in launches)
    idle = sum(item["idle_before"] for item in launches)
    return {"total": end - begin, "busy": busy, "idle": idle, "launches": launches}


def nsight(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """What ncu says of the kernels of one step, or why it says nothing."""
    program = shutil.which("ncu")
    if program is None:
        return {"unavailable": "ncu is not on the PATH"}
    command = [program, "--csv", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--metrics", ",".join(_METRICS), sys.executable, "-m", "benchmarks.profile_loss", "--once", *arguments]
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the program that it profiles too: it holds the GPU
            return {"unavailable": f"ncu took longer than {seconds:.0f} s"}
    rows = parse_ncu(out)
    if not rows:
        return {"unavailable": (out + err).strip()[-300:]}
    return {"kernels": rows}


def parse_ncu(text: str) -> list[dict[str, Any]]:
    """One dict per launch, in order, from ncu's CSV (which follows whatever the program itself printed)."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name = _METRICS.get(row.get("Metric Name") or "")
        if name is None:
            continue
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"][:160]})
        value = float(row["Metric Value"].replace(",", ""))
        unit = row["Metric Unit"]
        scale = {"us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6}.get(unit, 1.0) if name == "nanoseconds" else 1.0
        launch[name] = value * scale
    return list(launches.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Profiles and writes ``profile-<kind>.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-ncu", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--once", type=int, nargs="?", const=0, help="run one step of this shape; what ncu starts")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    backend = "triton" if device.type == "cuda" else "torch"
    if args.once is not None:
        _run_once(ours(Operands.random(shapes(device, args.quick)[args.once], device), backend))
        return
    profiles: list[dict[str, Any]] = []
    path = args.results / f"profile-{device.type}{'-quick' if args.quick else ''}.json"
    for number, shape in enumerate(shapes(device, args.quick)):
        step = ours(Operands.random(shape, device), backend)
        rows = kernels(step, device)
        entry = {"case": shape.parameters(), "backend": backend, **describe(device), "kernels": rows}
        if device.type == "cuda":
            entry["timeline"] = timeline(step, device)
            print_timeline(entry["timeline"])
        del step
        entry |= {"clock": clock_state(device)}
        profiles.append(entry)
        print(f"\n{json.dumps(shape.parameters())}")
        for row in rows[:12]:
            print(f"  {row['share']:6.1%} {row['seconds'] * 1e6:10.1f} us  {row['calls']:6.1f} x  {row['kernel'][:90]}")
        write_json(path, rounded({"profiles": profiles}))  # before ncu: it may be what takes too long
        if device.type == "cuda" and not args.no_ncu:
            torch.cuda.empty_cache()
            entry["ncu"] = nsight([str(number), "--device", args.device], _NCU_SECONDS[args.quick])
            write_json(path, rounded({"profiles": profiles}))
            print("  ncu:", entry["ncu"].get("unavailable") or f"{len(entry['ncu']['kernels'])} launches")
    print(f"written to {path}")


def print_timeline(found: dict[str, Any]) -> None:
    """A line a launch."""
    if "unavailable" in found:
        print(f"  timeline: {found['unavailable']}")
        return
    print(f"  timeline: {found['total']:.1f} us, of which {found['busy']:.1f} busy, {found['idle']:.1f} idle")
    for item in found["launches"]:
        print(f"  {item['at']:9.1f} +{item['idle_before']:6.1f} idle {item['takes']:9.1f} us  {item['kernel'][:80]}")


def _run_once(step: Callable[[], Any]) -> None:
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
