"""The harness: turns, spread, the gate, rows, files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import command, suite
from benchmarks.harness import (
    PEAK,
    Case,
    Comparison,
    DeviceLost,
    Inaccurate,
    Provider,
    Settings,
    memory,
    rows,
    run_case,
)
from benchmarks.harness import comparison as comparisons
from benchmarks.harness.timing import Budget, Clock, interleaved, quartiles, ratio_quartiles

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, Budget(seconds=0.0, min_rounds=5, max_rounds=5, warmup=1))


def test_everyone_runs_once_a_round_in_a_turning_order() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved(calls, Clock(CPU), Budget(seconds=0.0, min_rounds=3, max_rounds=9, warmup=1))
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_rounds_go_on_while_there_is_time() -> None:
    seconds = interleaved(
        {"a": lambda: time.sleep(0.001)}, Clock(CPU), Budget(seconds=0.05, min_rounds=1, max_rounds=1000)
    )
    assert 1 < len(seconds["a"]) <= 60
    assert min(seconds["a"]) >= 0.001


def test_spread_and_ratios_are_medians_and_quartiles() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "p25": 2.0, "p75": 4.0, "least": 1.0}
    # of the ratio within a round, not the ratio of the medians (which would be 1)
    assert ratio_quartiles([1.0, 10.0, 4.0], [2.0, 4.0, 10.0])["median"] == 0.5


def _case(**providers: Provider) -> Case:
    reference = Provider(lambda: lambda: time.sleep(0.001))
    build = lambda settings: Comparison({"reference": reference, **providers}, "reference", flops=1e6)  # noqa: E731
    return Case("made-up", {"n": 1}, build)


def _raises(error: Exception) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise error

    return call


def test_only_what_is_right_is_timed() -> None:
    timed: list[str] = []
    case = _case(
        good=Provider(lambda: lambda: time.sleep(0.003), lambda step: {"value": 0.0}),
        wrong=Provider(lambda: lambda: timed.append("wrong"), _raises(Inaccurate({"value": 3.0}, "off by 3"))),
        away=Provider(None, unavailable="not installed"),
        large=Provider(_raises(torch.OutOfMemoryError("too large"))),
        broken=Provider(_raises(KeyError("x"))),
    )
    rows_by_name = {row["contestant"]: row for row in run_case(case, SETTINGS)}
    statuses = {name: row["status"] for name, row in rows_by_name.items()}
    assert statuses == {
        "reference": "ok",
        "good": "ok",
        "wrong": "wrong",
        "away": "unavailable",
        "large": "out of memory",
        "broken": "failed",
    }
    assert [name for name, row in rows_by_name.items() if "seconds" in row] == ["reference", "good"]
    assert not timed
    assert rows_by_name["wrong"]["error"] == {"value": 3.0} and rows_by_name["wrong"]["reason"] == "off by 3"
    assert rows_by_name["away"]["reason"] == "not installed"
    assert rows_by_name["good"]["ratio"]["median"] > 1.5
    assert rows_by_name["reference"]["ratio"]["median"] == 1.0


def test_a_case_too_large_for_the_device_is_a_row() -> None:
    case = Case("made-up", {"n": 1}, _raises(torch.OutOfMemoryError("no room")))
    (row,) = run_case(case, SETTINGS)
    assert (row["status"], row["reason"]) == ("out of memory", "no room")


def test_running_out_of_memory_after_the_check() -> None:
    def make() -> Callable[[], None]:
        calls = iter(range(9))

        def step() -> None:
            if next(calls):
                raise torch.OutOfMemoryError("no room")

        return step

    rows_by_name = {row["contestant"]: row for row in run_case(_case(large=Provider(make)), SETTINGS)}
    assert rows_by_name["large"]["status"] == "out of memory" and "seconds" not in rows_by_name["large"]
    assert "seconds" in rows_by_name["reference"]


def test_timing_that_breaks_off_costs_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> dict[str, list[float]]:
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(comparisons, "interleaved", breaks)
    (row,) = run_case(_case(), SETTINGS)
    assert row["status"] == "failed" and "broke off: unspecified launch failure" in row["reason"]


def test_a_provider_that_loses_the_device_is_left_out_of_a_new_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(comparisons, "alive", lambda device: False)
    case = _case(peer=Provider(_raises(RuntimeError("an illegal memory access was encountered"))))
    with pytest.raises(DeviceLost, match="peer"):
        run_case(case, SETTINGS)
    rows_by_name = {
        row["contestant"]: row for row in run_case(case, Settings(CPU, SETTINGS.budget, without=frozenset({"peer"})))
    }
    assert rows_by_name["peer"]["status"] == "failed" and "seconds" in rows_by_name["reference"]

    became: list[list[str]] = []
    grid = [_case(), case]
    monkeypatch.setattr(suite, "cases_of", lambda *_: iter(grid))
    monkeypatch.setattr(command, "_replace_process", lambda command: became.append(command[command.index("topn") :]))
    arguments = ["topn", "--quick", "--device", "cpu", "--results", str(tmp_path)]
    command.main(arguments)
    assert became == [[*arguments, "--resume", "topn:1", "peer"]]
    assert len(rows.read(tmp_path)) == 1  # what was measured before is written already
    assert command.main(became[0]) == 0
    assert [row["contestant"] for row in rows.read(tmp_path)] == ["reference", "reference", "peer"]
    grid.append(_case(other=Provider(_raises(RuntimeError("again")))))
    command.main(became[0])
    assert became[-1] == [*arguments, "--resume", "topn:2", "other", "peer"]


def test_a_row_says_where_and_on_what_it_was_taken() -> None:
    row = run_case(_case(), SETTINGS)[0]
    for key in ("commit", "device", "driver", "kind", "versions", "clock", "seconds", "noise", "timing", "memory"):
        assert key in row, key
    assert row["versions"]["torch"] == torch.__version__
    assert row["seconds"]["rounds"] == 5
    json.dumps(row)


def test_only_some_providers() -> None:
    case = _case(a=Provider(lambda: lambda: None), b=Provider(lambda: lambda: None))
    rows = run_case(case, Settings(CPU, SETTINGS.budget, frozenset({"b"})))
    assert [row["contestant"] for row in rows] == ["reference", "b"]


def test_limits_are_held_against_ratios_and_memory() -> None:
    seconds = {"ours": [1.0, 1.0, 4.0], "theirs": [2.0, 4.0, 4.0]}
    limits = {"theirs": 0.5, "absent": 1.0, PEAK: 10.0}
    assert comparisons._check_limits(limits, "ours", seconds, {"delta": 16}) == {
        "theirs": {"median": 0.5, "range": [0.25, 1.0], "limit": 0.5, "met": True},
        PEAK: {"median": 16, "limit": 10.0, "met": False},
    }
    assert set(comparisons._check_limits(limits, "ours", seconds, None)) == {"theirs"}


def test_processor_time_does_not_count_sleep() -> None:
    (slept,) = Clock(CPU, cpu_time=True).round([lambda: time.sleep(0.05)])
    assert slept < 0.04 and Clock(CPU, cpu_time=True).method == "process_time"


def test_peak_memory_sees_what_a_step_frees_again() -> None:
    peak = memory.peak_memory(lambda: torch.ones(40 << 18).sum(), CPU)  # 40 MiB
    if peak is None:
        pytest.skip("this system does not let the peak be reset")
    assert 35 < peak["delta"] / 2**20 < 60
    assert peak["absolute"] > peak["delta"]


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    row = {"benchmark": "x", "contestant": "y", "value": 1 / 3, "many": [1 / 7, {"z": 2}]}
    rows.write(path, [row])
    (tmp_path / "other.json").write_text('{"benchmark": "someone else\'s"}')
    assert rows.read(tmp_path) == [{"benchmark": "x", "contestant": "y", "value": 0.33333, "many": [0.14286, {"z": 2}]}]
    with pytest.raises(TypeError):
        rows.write(path, [row, {"no json": object()}])
    assert len(rows.read(tmp_path)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "some.json"]
