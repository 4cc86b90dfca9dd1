"""A contest: several ways to do the same work on the same operands, checked, then timed in turns."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import memory
from benchmarks.harness.environment import clock_state, describe
from benchmarks.harness.rows import Row
from benchmarks.harness.timing import Clock, Effort, as_graph, interleaved, ratios, spread

_GRAPH_SECONDS = 3e-4  # shorter steps are timed as replays of a graph of many
CONTROL = "again"


class Wrong(Exception):
    """Raised by a contestant's check: its result is not right. The errors found are its argument."""


class DeviceLost(Exception):
    """A contestant left the device unusable for this process (an illegal address does). Its argument is the name."""


@dataclass
class Contestant:
    """One way to do the work.

    Attributes:
        make: makes what it needs and returns one step of work; may raise.
        check: runs a step and returns its errors against the truth, or raises `Wrong`; None: nothing to check.
        unavailable: why it cannot run here; None where it can.
        does: what it computes, in the words of the tables.
    """

    make: Callable[[], Callable[[], Any]] | None = None
    check: Callable[[Callable[[], Any]], dict[str, float]] | None = None
    unavailable: str | None = None
    does: str = ""


@dataclass
class Contest:
    """The contestants of one case.

    Attributes:
        contestants: by name, in the order of the tables.
        reference: the name of the one that the others are measured against (plain products of the same operands).
        flops, bytes: the least work that any of them must do; 0 where it has no meaning.
        tokens: tokens per step, for rates.
        graphs: short steps may be captured in CUDA graphs.
        dtype: of the products, for the ceiling.
        forget: called between the checks and the timing, to free what only the checks needed.
    """

    contestants: dict[str, Contestant]
    reference: str
    flops: float = 0.0
    bytes: float = 0.0
    tokens: int = 0
    graphs: bool = True
    dtype: torch.dtype = torch.float32
    forget: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Case:
    """One point of a grid; `build` makes its operands only when it is its turn.

    Attributes:
        benchmark: the name of the file it is from.
        parameters: plain numbers and strings that identify it.
        build: makes the contest.
    """

    benchmark: str
    parameters: dict[str, Any]
    build: Callable[[Settings], Contest] = field(compare=False)


@dataclass(frozen=True)
class Settings:
    """How a run is done.

    Attributes:
        device: where.
        effort: how long each contest is timed.
        only: names of contestants to run (and the reference); None: all.
        memory: whether peaks are measured.
        without: names of contestants that lost the device in an earlier process.
    """

    device: torch.device
    effort: Effort
    only: frozenset[str] | None = None
    memory: bool = True
    without: frozenset[str] = frozenset()


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Checks and times one case.

    Returns:
        One row per contestant. A row without "seconds" says in "status" and "reason" why it has none: unavailable,
        wrong (with its errors), out of memory, failed.

    Raises:
        DeviceLost: nothing more can be run in this process.
    """
    device = settings.device
    base = {"benchmark": case.benchmark, "case": case.parameters, **describe(device)}
    try:
        contest = case.build(settings)
    except torch.OutOfMemoryError as error:
        _release(device)
        return [{"contestant": "(operands)", "does": "", **base, "status": "out of memory", "reason": _line(error)}]
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for name, contestant in contest.contestants.items():
        if settings.only is not None and name not in settings.only and name != contest.reference:
            continue
        row = rows[name] = {"contestant": name, "does": contestant.does, **base}
        if name in settings.without:
            row |= {"status": "failed", "reason": "it left the device unusable, and is left out from there on"}
            continue
        step = admit(contestant, row)
        if step is not None:
            steps[name] = step
        elif row["status"] == "failed" and not alive(device):
            raise DeviceLost(name)
    if contest.forget is not None:
        contest.forget()
    peaks = _peaks(steps, rows, device) if settings.memory else {}
    if contest.reference in steps:
        try:
            _measure(contest, steps, rows, peaks, settings)
        except Exception as error:  # the next case may still be measured
            for name in steps:
                status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
                rows[name] |= {"status": status, "reason": f"the timing of this case broke off: {_line(error)}"}
    steps.clear()
    contest.contestants.clear()
    _release(device)
    return list(rows.values())


def admit(contestant: Contestant, row: Row) -> Callable[[], Any] | None:
    """The step of a contestant that is there and right; otherwise None, and the row says why."""
    if contestant.unavailable is not None or contestant.make is None:
        row |= {"status": "unavailable", "reason": contestant.unavailable}
        return None
    try:
        step = contestant.make()
        if contestant.check is not None:
            row["error"] = contestant.check(step)
        else:
            step()
    except Wrong as wrong:
        row |= {"status": "wrong", "error": wrong.args[0], "reason": wrong.args[1] if len(wrong.args) > 1 else ""}
        return None
    except torch.OutOfMemoryError as error:
        row |= {"status": "out of memory", "reason": _line(error)}
    except Exception as error:  # a peer may raise anything
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {_line(error)}"}
        if "ntpseg" in row["contestant"]:
            traceback.print_exc()
    else:
        row["status"] = "ok"
        return step
    gc.collect()
    return None


def _peaks(steps: dict[str, Callable[[], Any]], rows: dict[str, Row], device: torch.device) -> dict[str, Any]:
    """Peak memory of each step; one that finds none left beside the others' operands is out of the contest."""
    found = {}
    for name, step in list(steps.items()):
        try:
            found[name] = memory.peak(step, device)
        except Exception as error:  # a peer may raise anything, the second time too
            status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
            rows[name] |= {"status": status, "reason": _line(error)}
            del steps[name]
            if not alive(device):
                raise DeviceLost(name) from error
    return found


def _measure(
    contest: Contest,
    steps: dict[str, Callable[[], Any]],
    rows: dict[str, Row],
    peaks: dict[str, Any],
    settings: Settings,
) -> None:
    device, clock = settings.device, Clock(settings.device)
    calls = {**steps, CONTROL: steps[contest.reference]}
    repeats = dict.fromkeys(calls, 1)
    if contest.graphs and device.type == "cuda":
        capture(calls, repeats, clock)
    seconds = interleaved(calls, clock, settings.effort)
    seconds = {name: [value / repeats[name] for value in values] for name, values in seconds.items()}
    reference = seconds[contest.reference]
    state = clock_state(device)
    for name in steps:
        row = rows[name]
        middle = spread(seconds[name])
        row |= {
            "seconds": middle | {"rounds": len(seconds[name])},
            "reference": contest.reference,
            "ratio": ratios(seconds[name], reference),
            "noise": ratios(seconds[CONTROL], reference),
            "timing": f"CUDA graph of {repeats[name]}" if repeats[name] > 1 else clock.method,
            "clock": state,
            "work": {"flops": contest.flops, "bytes": contest.bytes, "tokens": contest.tokens},
            "dtype": str(contest.dtype).removeprefix("torch."),
        }
        if peaks.get(name) is not None:
            row["memory"] = peaks[name]


def capture(calls: dict[str, Callable[[], Any]], repeats: dict[str, int], clock: Clock) -> None:
    """Replaces short steps by graphs where they can be captured."""
    for name, call in list(calls.items()):
        clock.round([call])
        if clock.round([call])[0] > _GRAPH_SECONDS:
            continue
        try:
            calls[name] = as_graph(call, 20)
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


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else ""
