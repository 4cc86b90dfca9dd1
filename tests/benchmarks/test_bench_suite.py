"""Every benchmark runs in its quick form on a CPU, and the report is made of what it wrote."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import attention, loss, packed_attention, profile_loss
from benchmarks.command import main, parser
from benchmarks.harness import Case, Comparison, Provider, Settings, run_case
from benchmarks.harness.rows import read
from benchmarks.harness.timing import Budget
from benchmarks.operands import Operands
from benchmarks.report.pages import BEGIN, END, write_report
from benchmarks.report.plots import draw
from benchmarks.report.tables import COLUMNS, summary
from benchmarks.suite import BENCHMARKS
from ntpseg.cli import app
from ntpseg.kernels.chunks import plan_chunks
from ntpseg.models import causal_blocks
from ntpseg.models.attention import AttentionUse

QUICK = ["--quick", "--device", "cpu", "--seconds", "0"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the whole quick suite."""
    folder = tmp_path_factory.mktemp("results")
    assert main(["all", *QUICK, "--results", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", BENCHMARKS)
def test_quick_form(results: Path, name: str) -> None:
    rows = [row for row in read(results) if row["benchmark"] == name]
    timed = {row["contestant"] for row in rows if "seconds" in row}
    assert any(provider.startswith("ntpseg") for provider in timed)
    assert rows[0]["reference"] in timed
    assert len(timed) >= 3
    assert {row["status"] for row in rows} <= {"ok", "unavailable"}
    assert all(row["reason"] for row in rows if row["status"] == "unavailable")
    checked = [row for row in rows if "seconds" in row and row["contestant"] != row["reference"]]
    assert all(row["error"] for row in checked)


def test_loss_knows_its_peers(results: Path) -> None:
    rows = {row["contestant"]: row for row in read(results) if row["benchmark"] == "loss"}
    for name in ("torch linear_cross_entropy", "liger", "cut-cross-entropy", "quack"):
        assert rows[name]["does"].startswith("CE") and "TCL" not in rows[name]["does"]
        assert rows[f"{name} + terms"]["does"] == "CE + TCL + HET"
    for backend in ("torch", "triton"):
        assert rows[f"ntpseg {backend}"]["does"] == "CE + TCL + HET"
    graph = rows["ntpseg triton graph"]
    assert (graph["does"], graph["status"]) == ("CE + TCL + HET", "unavailable") and "CUDA device" in graph["reason"]
    assert {json.dumps(row["case"]) for row in read(results) if row["benchmark"] == "loss"} == {
        json.dumps({"R": 64, "D": 32, "V": 300, "k": 2, "m": 3, "logits": logits, "dtype": "float32"})
        for logits in ("random", "peaked")
    }


def test_attention_of_packed_rows(results: Path) -> None:
    rows = [
        row for row in read(results) if row["benchmark"] == "attention" and str(row["case"]["T"]).startswith("pack")
    ]
    assert [row["contestant"] for row in rows] == ["products", "ntpseg causal_blocks", "sdpa", "eager"]
    assert all(row["status"] == "ok" and row["ratio"]["p25"] <= row["ratio"]["median"] for row in rows)
    assert {row["reference"] for row in rows} == {"products"}
    # The tokens of the sequences, without what fills the rows.
    shape = packed_attention.GRIDS["quick"][0]
    assert {row["work"]["tokens"] for row in rows} == {sum(shape.lengths())}
    assert max(shape.lengths()) >= causal_blocks.MIN_TOKENS, "one sequence is computed in blocks"


def test_attention_across_packed_sequences_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(name: str, use: AttentionUse, packed: Any = None) -> Any:
        return lambda q, k, v: causal_blocks.reference(q, k, v, scale=use.width**-0.5).transpose(1, 2)

    monkeypatch.setattr(packed_attention, "attention_function", whole)
    (case,) = (case for case in attention.cases(torch.device("cpu"), "quick") if "pack" in str(case.parameters["T"]))
    rows = run_case(case, Settings(torch.device("cpu"), Budget(0.0, 2, 2, 0)))
    assert {row["contestant"]: row["status"] for row in rows if row["contestant"] != "products"} == dict.fromkeys(
        packed_attention.CANDIDATES, "wrong"
    )


def test_report_replaces_its_own_section_only(results: Path, tmp_path: Path) -> None:
    docs = tmp_path / "benchmarks.md"
    profile_loss.main(["--quick", "--device", "cpu", "--results", str(results)])
    docs.write_text(f"# Benchmarks\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    write_report(results, docs)
    text = docs.read_text()
    assert text.startswith("# Benchmarks\n\nbefore\n\n" + BEGIN) and text.endswith(END + "\n\nafter\n")
    assert "\nold\n" not in text
    assert "No figure here was taken on a GPU" in text and "`ntpseg bench loss`" in text
    (path,) = (tmp_path / "benchmarks").iterdir()
    assert f"(benchmarks/{path.name}): attention, decode, loss, topn, train" in text
    page = path.read_text()
    for title in ("Loss, forward and backward", "Decoding masks", "A whole training step"):
        assert f"## {title}" in page
    assert "- liger: unavailable: needs a CUDA device" in page
    pictures = sorted((tmp_path / "figures").glob("*.svg"))
    assert any("roofline" in p.name for p in pictures) and any("memory" in p.name for p in pictures)
    assert all(f"(../figures/{p.name})" in page for p in pictures)
    assert "## Kernels of the loss: R 64" in page


def test_pictures_change_with_the_rows_only(results: Path, tmp_path: Path) -> None:
    rows = [row for row in read(results) if row["benchmark"] == "topn"]
    first, second = (draw(rows, tmp_path / name, "bench") for name in ("a", "b"))
    assert [title for title, _ in first] == ["Speed", "Memory"]
    assert [path.read_bytes() for _, path in first] == [path.read_bytes() for _, path in second]


def test_a_provider_without_a_time_in_one_case_is_still_shown(results: Path) -> None:
    rows = [row for row in read(results) if row["benchmark"] == "topn"]
    # More cases than a block holds, so that the one without a time is alone in its own.
    cases = [[{**row, "case": {**row["case"], "n": n}} for row in rows] for n in range(1, COLUMNS + 2)]
    last = next(row for row in cases[-1] if "seconds" in row)
    name = last["contestant"]
    wrong = {key: value for key, value in last.items() if key != "seconds"} | {"status": "wrong"}
    lines = list(summary([wrong if row is last else row for case in cases for row in case]))
    assert sum(line.startswith(f"| {name} |") for line in lines) == 2
    assert any(line.startswith(f"| {name} |") and line.endswith("| wrong |") for line in lines)


def test_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results must be a folder with rows .*no rows"):
        write_report(tmp_path, tmp_path / "results.md")


def test_where_picks_cases(tmp_path: Path) -> None:
    arguments = ["loss", *QUICK, "--results", str(tmp_path), "--only", "ntpseg torch", "--where", "logits=peaked"]
    assert main(arguments) == 0
    rows = read(tmp_path)
    assert [(row["contestant"], row["case"]["logits"]) for row in rows] == [
        ("three products", "peaked"),
        ("ntpseg torch", "peaked"),
    ]


def test_a_part_of_a_benchmark_leaves_the_other_rows(tmp_path: Path) -> None:
    def run(*arguments: str) -> int:
        return main(["topn", *QUICK, "--results", str(tmp_path), *arguments])

    assert run() == 0
    whole = read(tmp_path)
    names = {row["contestant"] for row in whole}
    case = whole[0]["case"]
    where = [f"{key}={value}" for key, value in case.items()]
    (name,) = sorted(n for n in names if n.startswith("ntpseg"))[:1]
    assert run("--only", name, "--where", *where) == 0
    again = read(tmp_path)

    def keys(rows):
        return sorted((json.dumps(row["case"]), row["contestant"]) for row in rows)

    assert keys(again) == keys(whole)
    # Those of the case that ran are new, the others what they were.
    kept = [row for row in whole if row["case"] != case or row["contestant"] not in (name, "copies")]
    assert all(row in again for row in kept) and len(kept) < len(whole)
    assert run() == 0
    assert keys(read(tmp_path)) == keys(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nope"], "--only must name providers of topn, got 'nope', which no case has"),
        (["--where", "nope=1"], "--where must leave a case of topn, got nope=1"),
        (["--where", "nope"], "--where must be KEY=VALUE, got 'nope'"),
        (["--threads", "-2"], "--threads must be >= 1, got -2"),
        (["--threads", "0"], "--threads must be >= 1, got 0"),
        (["--seconds", "-1"], "--seconds must be >= 0, got -1"),
    ],
)
def test_options_that_choose_nothing_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        main(["topn", *QUICK, "--results", str(tmp_path), *arguments])


@pytest.mark.parametrize("arguments", [["--threads", "1", "topn", "--quick"], ["topn", "--quick", "--threads", "1"]])
def test_options_may_stand_before_the_benchmark(monkeypatch, arguments: list[str]) -> None:
    given = []
    monkeypatch.setattr("ntpseg.commands.bench.run_in_checkout", lambda command, module: given.append(module) or 0)
    assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 0
    args = parser().parse_args(given[0][1:])
    assert (args.what, args.threads, args.quick) == ("topn", 1, True)


def test_profile_runs(tmp_path: Path) -> None:
    profile_loss.main(["--quick", "--device", "cpu", "--results", str(tmp_path)])
    profile = json.loads((tmp_path / "profile-cpu-quick.json").read_text())["profiles"][0]
    # Only the thirty longest are kept: a tail of short ones may be missing from the sum, never added to it.
    shares = [row["share"] for row in profile["kernels"]]
    assert shares == sorted(shares, reverse=True) and len(shares) <= 30
    assert 0.6 < sum(shares) <= 1.0 + 1e-9
    totals = [row["seconds"] / row["share"] for row in profile["kernels"]]
    assert totals == pytest.approx([totals[0]] * len(totals), rel=0.01)  # written with few digits
    assert profile["kernels"][0]["seconds"] >= profile["kernels"][-1]["seconds"] > 0


def test_ncu_output_is_read() -> None:
    text = """==PROF== Connected
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","9","gemm","gpu__time_duration.sum","us","1,234.5"
"0","9","gemm","sm__throughput.avg.pct_of_peak_sustained_elapsed","%","91.5"
"1","9","touch","gpu__time_duration.sum","ns","700"
"1","9","touch","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","80"
"""
    assert profile_loss.parse_ncu(text) == [
        {"kernel": "gemm", "nanoseconds": 1234500.0, "compute_percent": 91.5},
        {"kernel": "touch", "nanoseconds": 700.0, "memory_percent": 80.0},
    ]
    assert profile_loss.parse_ncu("==ERROR== no permission") == []


def _ncu(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = folder / "ncu"
    program.write_text("#!/bin/sh\n" + body)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_ncu_is_stopped_with_what_it_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ncu(tmp_path, monkeypatch, f"sleep 60 &\necho $! > {tmp_path}/child\nwait\n")
    assert profile_loss.nsight(["0"], 1.0) == {"unavailable": "ncu took longer than 1 s"}
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    for _ in range(50):
        if not child.exists() or "\nState:\tZ" in (child / "status").read_text():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the profiled program is still there")


def test_ncu_says_why_it_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ncu(tmp_path, monkeypatch, "echo '==ERROR== ERR_NVGPUCTRPERM'\nexit 1\n")
    assert "ERR_NVGPUCTRPERM" in profile_loss.nsight(["0"], 20.0)["unavailable"]


def test_a_step_in_a_graph_is_checked_after_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the capture leaves in the results is no result: a replay must have written them."""
    operands = Operands.random(loss.Shape(32, 8, 50, 3, 2, dtype="float32"), torch.device("cpu"))
    asked: dict[str, Any] = {}
    held = {"loss": torch.zeros(()), "hidden": torch.zeros(3, 2), "d_weight": None, "tokens": torch.zeros(3).long()}

    def step() -> dict[str, torch.Tensor | None]:
        for part in held.values():
            if part is not None:
                part.fill_(7)
        return dict(held)

    step.rows_of = dict  # type: ignore[attr-defined]
    monkeypatch.setattr(loss, "ours", lambda operands, backend, **how: asked.update(how, backend=backend) or step)
    idle = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: idle)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda anything: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=step))
    replay = loss.graphed(operands)
    # head 0 has 32 supervised rows, those after it fewer
    assert asked == {"backend": "triton", "max_rows": 32}
    assert torch.isnan(held["loss"]) and torch.isnan(held["hidden"]).all() and (held["tokens"] == -1).all()
    result = replay()
    assert float(result["loss"]) == 7 and (result["tokens"] == 7).all() and result["d_weight"] is None
    assert replay.rows_of(result) == result
    assert replay.memory == {"delta": 250, "absolute": 350, "method": "max_memory_allocated"}


def test_a_step_that_knows_its_peak_is_not_measured_again() -> None:
    def step() -> None:
        return None

    step.memory = {"delta": 5, "absolute": 6, "method": "capture"}  # type: ignore[attr-defined]
    providers = {"three products": Provider(lambda: step), "ntpseg graph": Provider(lambda: step)}
    settings = Settings(torch.device("cpu"), Budget(seconds=0.0, min_rounds=2, max_rounds=2, warmup=0))
    rows = run_case(Case("loss", {}, lambda settings: Comparison(providers, "three products")), settings)
    assert [row["memory"]["delta"] for row in rows] == [5, 5]


def test_quick_on_a_gpu_measures_what_matters_first() -> None:
    quick = loss.shapes(torch.device("cuda"), "quick")
    assert [(s.width, s.classes) for s in quick[:2]] == [(4096, 32768), (4096, 184622)]
    plain = {(s.width, s.classes) for s in quick if (s.rows, s.heads, s.dtype) == (6272, 1, "bfloat16")}
    assert plain == {(d, v) for d in (1024, 2048, 4096) for v in (32768, 184622)}
    assert [(s.rows, s.heads) for s in quick[-2:]] == [(32768, 4), (32768, 1)]
    many = quick[-1]
    plan = partial(plan_chunks, many.rows, many.classes, many.width, torch.bfloat16, fused=True, BLOCK_N=256)
    for workspace in ("small", "fast"):
        assert plan(needs_accumulator=True, workspace=workspace).split_accumulator
    assert {s.logits for s in quick} == {"random", "peaked"}
    full = loss.shapes(torch.device("cuda"), "full")
    assert {(s.width, s.classes, s.rows) for s in full if s.classes == 184622} == {
        (d, 184622, r) for d in (1024, 2048, 4096) for r in (6272, 32768)
    }
