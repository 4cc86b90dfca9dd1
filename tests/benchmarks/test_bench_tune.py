"""``ntpseg bench tune``: what it drops, times, writes and keeps."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from benchmarks import tune
from benchmarks.command import main
from benchmarks.harness import Case, DeviceLost, Settings, run_case
from benchmarks.harness.resources import Resources, compiled_kernels, parse_resource_usage
from benchmarks.harness.rows import Row, read_file
from benchmarks.harness.timing import Budget
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, GemmConfig
from ntpseg.kernels.tl_utils import INTERPRETED
from ntpseg.kernels.tuned_configs import read_choice, triton_version

TABLE = GEMM_CONFIGS["interpreter"].forward
OTHER = GemmConfig(32, 64, 32, num_warps=4, num_stages=1, TMA=False)
THIRD = dataclasses.replace(OTHER, GROUP_SIZE_M=4)
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NTPSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(tune.CANDIDATES, "interpreter", (OTHER, THIRD))


def settings() -> Settings:
    return Settings(CPU, Budget(seconds=0.0, min_rounds=2, max_rounds=2, warmup=0))


def comparison(settings: Settings, **how: Any) -> tune.Comparison:
    return tune.comparison(40, 100, 32, settings, **how)


@interpreted
def test_times_every_candidate_against_the_library() -> None:
    rows = run_case(Case("tune", {"R": 40}, comparison), settings())
    assert [row["contestant"] for row in rows] == ["cuBLAS", *map(tune.name_of, (TABLE, OTHER, THIRD))]
    assert all(row["status"] == "ok" and row["ratio"]["median"] > 0 for row in rows)
    assert all(set(row["error"]) == {"e", "row_sum", "row_max", "argmax"} for row in rows[1:])


@interpreted
@pytest.mark.parametrize("part", ["e", "row_sum", "row_max", "argmax", "nothing"])
def test_a_wrong_candidate_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: tune.ForwardProduct) -> None:
        self.launch()
        if part == "e":
            self.operands.e[7, :5] += 1
        elif part == "nothing":
            self.operands.e[39] = torch.nan  # as if the last row had been left out
        else:
            getattr(self.block_stats, part)[:, 7] += 1

    monkeypatch.setattr(tune.ForwardProduct, "__call__", wrong)
    rows = run_case(Case("tune", {"R": 40}, lambda s: comparison(s, candidates=())), settings())
    assert rows[1]["status"] == "wrong" and rows[1]["reason"].startswith("e" if part == "nothing" else part)


def test_spilling_candidates_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = {b"fits": Resources(200, 0, 0), b"spills": Resources(255, 88, 0)}
    monkeypatch.setattr(tune, "resource_usage", usage.__getitem__)
    operands = SimpleNamespace(hidden=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(tune, "ForwardProduct", lambda operands, config: config)

    def compiled(config: Any) -> list[Any]:
        if config is None:
            raise RuntimeError("out of resource: shared memory\nrequired 300000")
        return [SimpleNamespace(asm={"cubin": b"fits"}), SimpleNamespace(asm={"cubin": config})]

    monkeypatch.setattr(tune, "compiled_kernels", compiled)
    assert tune.spills(operands, b"fits") is None
    assert tune.spills(operands, b"spills") == "registers spill: 88 bytes per thread"
    assert tune.spills(operands, None) == "does not compile: RuntimeError: out of resource: shared memory"


@interpreted
def test_a_dropped_candidate_has_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "spills", lambda operands, config: "registers spill" if config == OTHER else None)
    rows = {row["contestant"]: row for row in run_case(Case("tune", {}, comparison), settings())}
    dropped = rows[tune.name_of(OTHER)]
    assert (dropped["status"], dropped["reason"]) == ("unavailable", "registers spill") and "seconds" not in dropped
    assert "seconds" in rows[tune.name_of(THIRD)] and "seconds" in rows[tune.name_of(TABLE)]


def test_kernels_are_compiled_and_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> str:
        seen.append((args, grid, warmup, kwargs))
        return "kernel"

    monkeypatch.setattr(JITFunction, "run", run)

    def kernel(x, SIZE) -> None:  # type: ignore[no-untyped-def]  # a Triton kernel's arguments have no types
        pass

    function = JITFunction(kernel)
    assert compiled_kernels(lambda: function[(3,)](1, SIZE=2)) == ["kernel"]
    assert seen == [((1,), (3,), True, {"SIZE": 2})]
    assert JITFunction.run is run


def test_resources_are_read_from_every_function() -> None:
    text = """Resource usage:
 Common:
  GLOBAL:0
 Function helper:
  REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function anchored_gemm_kernel:
  REG:255 STACK:0 SHARED:0 LOCAL:8 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert parse_resource_usage(text) == Resources(255, 16, 8) and parse_resource_usage(text).spilled == 24
    with pytest.raises(RuntimeError, match="cuobjdump must print REG"):
        parse_resource_usage("cuobjdump fatal: not a cubin")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_spill_is_seen_before_a_launch(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    script = str(Path(__file__).with_name("compile_candidates.py"))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    in_use, starved = (Resources(**json.loads(line)) for line in done.stdout.splitlines())
    assert in_use.spilled == 0 and 160 < in_use.registers <= 255
    assert starved.spilled > 0 and starved.registers <= 160


def test_names_tell_candidates_apart() -> None:
    for architecture, configs in tune.CANDIDATES.items():
        names = [tune.name_of(config) for config in (GEMM_CONFIGS[architecture].forward, *configs)]
        assert len(set(names)) == len(names)
    assert tune.name_of(GEMM_CONFIGS["sm_90"].forward) == "128x256x64-w8-s4-tma-flatten-sub4"
    assert tune.name_of(THIRD) == "32x64x32-w4-s1-group4"


def test_selection() -> None:
    first, second = map(tune.name_of, (OTHER, THIRD))
    assert tune.selected("interpreter", None, None) == [OTHER, THIRD]
    assert tune.selected("interpreter", [second, first], None) == [THIRD, OTHER]
    # what was kept must defend itself, or a few candidates could take the place of a better one
    assert tune.selected("interpreter", [first], THIRD) == [THIRD, OTHER]
    assert tune.selected("interpreter", None, TABLE) == [OTHER, THIRD]
    with pytest.raises(ValueError, match=r"^only must name candidates of interpreter \(32x64x32.*\), got 'big'$"):
        tune.selected("interpreter", ["big"], None)


def timed(config: GemmConfig, seconds: float, width: int) -> list[Row]:
    """What `run_case` makes of a candidate beside the table's tile, which takes a second."""
    base = {"benchmark": "tune", "case": {"R": 1, "V": 2, "D": width}, "does": "", "status": "ok"}
    figures = {"ratio": {"median": seconds, "p25": seconds, "p75": seconds}}
    return [
        {**base, "contestant": tune.name_of(tile), "seconds": {"median": value}, **figures}
        for tile, value in ((TABLE, 1.0), (config, seconds))
    ]


def tuning(path: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[GemmConfig, list[float] | None]) -> tune.Tuning:
    """A run over two shapes with these times; None: the candidate is wrong."""

    def run(case: Case, settings: Settings) -> list[Row]:
        config = case.build.args[-1]  # type: ignore[attr-defined]
        times = seconds[config]
        rows = timed(config, 1.0 if times is None else times[case.parameters["D"] - 1], case.parameters["D"])
        if times is None:
            del rows[1]["seconds"]
            rows[1] |= {"status": "wrong", "reason": "e must be right"}
        return rows

    monkeypatch.setattr(tune, "run_case", run)
    return tune.Tuning(settings(), [(1, 2, 1), (1, 2, 2)], path)


def test_keeps_the_best_over_all_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    run = tuning(path, monkeypatch, {OTHER: [0.9, 1.0], THIRD: [0.8, 1.0]})
    assert run.run([OTHER, THIRD]) == 0
    assert run.gains == pytest.approx({OTHER: 0.9**0.5, THIRD: 0.8**0.5})
    assert read_choice("cpu", triton_version()) == THIRD
    entry = json.loads((tmp_path / "cache" / "gemm.json").read_text())["choices"]["cpu"][triton_version()]
    assert entry["time_over_table"] == pytest.approx(0.8944)
    assert entry["shapes"] == [{"R": 1, "V": 2, "D": 1}, {"R": 1, "V": 2, "D": 2}]
    rows = read_file(path)
    assert len(rows) == 8 and rows[1]["config"] == dataclasses.asdict(OTHER)


@pytest.mark.parametrize("seconds", [[0.995, 0.995], [0.5, 2.1], None])
def test_noise_and_wrong_tiles_are_not_kept(
    seconds: list[float] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tuning(tmp_path / "rows.json", monkeypatch, {OTHER: seconds})
    assert run.run([OTHER]) == (1 if seconds is None else 0)
    assert read_choice("cpu", triton_version()) is None and not (tmp_path / "cache").exists()


def test_a_choice_that_lost_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    tuning(path, monkeypatch, {OTHER: [0.9, 0.9]}).run([OTHER])
    assert read_choice("cpu", triton_version()) == OTHER
    tuning(path, monkeypatch, {OTHER: [1.1, 1.1], THIRD: [1.0, 1.2]}).run([OTHER, THIRD])
    assert read_choice("cpu", triton_version()) is None


def test_a_dry_run_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tuning(tmp_path / "rows.json", monkeypatch, {OTHER: [0.5, 0.5]})
    run.save = False
    assert run.run([OTHER]) == 0 and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert tuning(tmp_path / "rows.json", monkeypatch, {OTHER: [0.5, 0.5]}).run([OTHER]) == 0
    assert "the choice could not be kept: " in capsys.readouterr().out


def test_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    run = tuning(path, monkeypatch, {OTHER: [0.5, 0.5], THIRD: [0.4, 0.4]})
    now = iter([0.0, 10.0, 10.0])  # the first candidate takes ten of fifteen seconds: a second would not fit
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
    run.deadline = 15.0
    run.run([OTHER, THIRD])
    assert "stopped at the time limit: 1 of 2" in capsys.readouterr().out
    assert len(read_file(path)) == 4 and read_choice("cpu", triton_version()) == OTHER


def test_a_candidate_that_loses_the_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    run = tuning(path, monkeypatch, {})

    def lose(case: Case, settings: Settings) -> list[Row]:
        raise DeviceLost("it")

    monkeypatch.setattr(tune, "run_case", lose)
    with pytest.raises(SystemExit, match=r"^ntpseg bench: 32x64x32-w4-s1 left the device unusable"):
        run.run([OTHER])
    (row,) = read_file(path)
    assert row["contestant"] == tune.name_of(OTHER) and "--only" in row["reason"]


@interpreted
def test_the_whole_run(tmp_path: Path) -> None:
    arguments = ["--rows", "40", "--classes", "100", "--width", "32", "--repetitions", "2", "--time-limit", "300"]
    args = tune.parser().parse_args([*arguments, "--only", tune.name_of(OTHER), "--results", str(tmp_path)])
    before = threading.active_count()
    assert tune._tune(CPU, args) == 0
    assert threading.active_count() == before, "the watchdog must not outlive the run"
    (path,) = tmp_path.glob("tune-cpu-*.json")
    assert [row["contestant"] for row in read_file(path)] == ["cuBLAS", tune.name_of(TABLE), tune.name_of(OTHER)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "device must be a CUDA device for tuning, got none"),
        (["tune", "--device", "cpu"], "device must be a CUDA device for tuning, got cpu"),
        (["tune", "--device", "cuda:x"], "device must be cpu, cuda or cuda:N, got 'cuda:x'"),
        (["loss", "--device", "gpu"], "device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["loss", "--device", "meta"], "device must be cpu, cuda or cuda:N, got 'meta'"),
        (["tune", "--width", "100"], "width must be a multiple of 8, got 100"),
        (["tune", "--rows", "0"], "rows must be an integer >= 1, got 0"),
        (["tune", "--repetitions", "0"], "repetitions must be an integer >= 1, got 0"),
        (["tune", "--time-limit", "-1"], "time-limit must be seconds > 0, got -1"),
        (["tune", "--time-limit", "nan"], "time-limit must be seconds > 0, got nan"),
        (["--quick", "tune"], "tune must be the first argument, got options before it"),
    ],
)
def test_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        main(arguments)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--list"]) == 0
    out = capsys.readouterr().out
    assert "sm_90, in use: 128x256x64-w8-s4-tma-flatten-sub4\n  128x256x64-w8-s4-tma-flatten-sub2\n" in out
