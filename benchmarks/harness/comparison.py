"""A comparison: several providers of the same work on the same operands, checked, then timed in turns."""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from benchmarks.harness.accuracy import Inaccurate
from benchmarks.harness.environment import clock_state, describe
from benchmarks.harness.memory import peak_memory
from benchmarks.harness.rows import Row
from benchmarks.harness.timing import Budget, Clock, cuda_graph, interleaved, quartiles, ratio_quartiles

_GRAPH_SECONDS = 3e-4  # shorter steps are timed as replays of a graph of many
CONTROL = "again"
PEAK = "peak memory"

Step = Callable[[], Any]
Grid = Literal["full", "quick", "gate"]


class DeviceLost(Exception):
    """A provider left the device unusable for this process (an illegal address does). Its argument is the name."""


@dataclass
class Provider:
    """One way to do the work.

    Attributes:
        setup: makes what it needs and returns one step of work; may raise.
        check: runs a step and returns its errors against the truth, or raises `Inaccurate`; None: nothing to check.
        unavailable: why it cannot run here; None where it can.
        computes: what it computes, in the words of the tables.
        limits: what it promises: the largest median ratio to each of some providers, by name, and under `PEAK` the most
            bytes that a step adds at its peak.
    """

    setup: Callable[[], Step] | None = None
    check: Callable[[Any], dict[str, float]] | None = None
    unavailable: str | None = None
    computes: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Comparison:
    """The providers of one case.

    Attributes:
        providers: by name, in the order of the tables.
        reference: the name of the one that the others are measured against (plain products of the same operands).
        flops, bytes: the least work that any of them must do; 0 where it has no meaning.
        tokens: tokens per step, for rates.
        graphs: short steps may be captured in CUDA graphs.
        dtype: of the products, for the ceiling.
        release: called between the checks and the timing, to free what only the checks needed.
        facts: what every row of the case says besides.
    """

    providers: dict[str, Provider]
    reference: str
    flops: float = 0.0
    bytes: float = 0.0
    tokens: int = 0
    graphs: bool = True
    dtype: torch.dtype = torch.float32
    release: Callable[[], Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One point of a grid; `build` makes its operands only when it is its turn.

    Attributes:
        benchmark: the name of the file it is from.
        parameters: plain numbers and strings that identify it.
        build: makes the comparison.
    """

    benchmark: str
    parameters: dict[str, Any]
    build: Callable[[Settings], Comparison] = field(compare=False)


@dataclass(frozen=True)
class Settings:
    """How a run is done.

    Attributes:
        device: where.
        budget: how long each comparison is timed.
        only: names of providers to run (and the reference); None: all.
        without: names of providers that lost the device in an earlier process.
        cpu_time: processor time is counted in place of wall-clock time.
    """

    device: torch.device
    budget: Budget
    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()
    cpu_time: bool = False


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Checks and times one case.

    Returns:
        One row per provider. A row without "seconds" says in "status" and "reason" why it has none: unavailable,
        wrong (with its errors), out of memory, failed.

    Raises:
        DeviceLost: nothing more can be run in this process.
    """
    device = settings.device
    base = {"benchmark": case.benchmark, "case": case.parameters, **describe(device)}
    try:
        comparison = case.build(settings)
    except torch.OutOfMemoryError as error:
        _free(device)
        return [{"contestant": "(operands)", "does": "", **base, **_failure(error)}]
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for name, provider in comparison.providers.items():
        if settings.only is not None and name not in settings.only and name != comparison.reference:
            continue
        row = rows[name] = {"contestant": name, "does": provider.computes, **base, **comparison.facts}
        if name in settings.without:
            row |= {"status": "failed", "reason": "it left the device unusable, and is left out from there on"}
            continue
        step = checked_step(provider, row)
        if step is not None:
            steps[name] = step
        elif row["status"] == "failed" and not alive(device):
            raise DeviceLost(name)
    if comparison.release is not None:
        comparison.release()
    peaks = _peaks(steps, rows, device)
    if comparison.reference in steps:
        try:
            _measure(comparison, steps, rows, peaks, settings)
        except Exception as error:  # the next case may still be measured
            for name in steps:
                rows[name] |= _failure(error, "the timing of this case broke off: ")
    steps.clear()
    comparison.providers.clear()
    _free(device)
    return list(rows.values())


def checked_step(provider: Provider, row: Row) -> Step | None:
    """The step of a provider that is there and right; otherwise None, and the row says why."""
    if provider.unavailable is not None or provider.setup is None:
        row |= {"status": "unavailable", "reason": provider.unavailable}
        return None
    try:
        step = provider.setup()
        if provider.check is not None:
            row["error"] = provider.check(step)
        else:
            step()
    except Inaccurate as error:
        row |= {"status": "wrong", "error": error.args[0], "reason": error.args[1] if len(error.args) > 1 else ""}
        return None
    except Exception as error:  # a peer may raise anything
        row |= _failure(error, "" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: ")
        if row["status"] == "failed" and "ntpseg" in row["contestant"]:
            traceback.print_exc()
    else:
        row["status"] = "ok"
        return step
    gc.collect()
    return None


def _peaks(steps: dict[str, Step], rows: dict[str, Row], device: torch.device) -> dict[str, Any]:
    """Peak memory of each step; one that finds none left beside the others' operands is out of the comparison."""
    peaks = {}
    for name, step in list(steps.items()):
        try:
            # a graph's step brings its own: what it takes was allocated when it was captured
            peaks[name] = getattr(step, "memory", None) or peak_memory(step, device)
        except Exception as error:  # a peer may raise anything, the second time too
            rows[name] |= _failure(error)
            del steps[name]
            if not alive(device):
                raise DeviceLost(name) from error
    return peaks


def _measure(
    comparison: Comparison,
    steps: dict[str, Step],
    rows: dict[str, Row],
    peaks: dict[str, Any],
    settings: Settings,
) -> None:
    device, clock = settings.device, Clock(settings.device, settings.cpu_time)
    calls = {**steps, CONTROL: steps[comparison.reference]}
    repeats = dict.fromkeys(calls, 1)
    if comparison.graphs and device.type == "cuda":
        capture_graphs(calls, repeats, clock)
    seconds = interleaved(calls, clock, settings.budget)
    seconds = {name: [value / repeats[name] for value in values] for name, values in seconds.items()}
    reference = seconds[comparison.reference]
    state = clock_state(device)
    for name in steps:
        row = rows[name]
        row |= {
            "seconds": quartiles(seconds[name]) | {"rounds": len(seconds[name])},
            "reference": comparison.reference,
            "ratio": ratio_quartiles(seconds[name], reference),
            "noise": ratio_quartiles(seconds[CONTROL], reference),
            "timing": f"CUDA graph of {repeats[name]}" if repeats[name] > 1 else clock.method,
            "clock": state,
            "work": {"flops": comparison.flops, "bytes": comparison.bytes, "tokens": comparison.tokens},
            "dtype": str(comparison.dtype).removeprefix("torch."),
        }
        if peaks.get(name) is not None:
            row["memory"] = peaks[name]
        if limits := comparison.providers[name].limits:
            row["limits"] = _check_limits(limits, name, seconds, peaks.get(name))


def _check_limits(
    limits: Mapping[str, float], name: str, seconds: dict[str, list[float]], peak: dict[str, Any] | None
) -> dict[str, Any]:
    checked = {}
    for other, limit in limits.items():
        if other == PEAK and peak is not None:
            checked[other] = {"median": peak["delta"], "limit": limit}
        elif other in seconds:
            ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
            checked[other] = {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)], "limit": limit}
    return {other: check | {"met": check["median"] <= check["limit"]} for other, check in checked.items()}


def capture_graphs(calls: dict[str, Step], repeats: dict[str, int], clock: Clock) -> None:
    """Replaces short steps by graphs where they can be captured."""
    for name, call in list(calls.items()):
        clock.round([call])
        if clock.round([call])[0] > _GRAPH_SECONDS:
            continue
        try:
            calls[name] = cuda_graph(call, 20)
            repeats[name] = 20
        except RuntimeError:
            torch.cuda.synchronize()


def alive(device: torch.device) -> bool:
    """Whether this process can still use the device."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _failure(error: BaseException, prefix: str = "") -> Row:
    status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
    return {"status": status, "reason": prefix + first_line(error)}


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a row."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""
