"""``training.profile_steps``: a trace, and a table whose parts are those of the step."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from toy import losses, make_toy, make_trainer

from ntpseg.training.arguments import training_arguments
from ntpseg.training.config import load_config
from ntpseg.training.profile_table import PARTS, OperatorTime, PartTime, ProfileTable, profile_table
from ntpseg.training.profiling import ProfileSteps, mark_modules
from ntpseg.utils import ranges
from ntpseg.utils.ranges import part, profiling


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_run_writes_its_trace_and_table(tmp_path: Path, epochs: int) -> None:
    """Of fewer steps than asked for where training ends early; nothing stays behind and no figure changes."""
    plain = make_trainer(make_toy(8), tmp_path / "plain", num_train_epochs=epochs)
    before = hooks(plain.model)
    plain.train()
    trainer = make_trainer(
        make_toy(8), tmp_path, num_train_epochs=epochs, callbacks=[ProfileSteps(tmp_path, 3)], evaluate=True
    )
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert hooks(trainer.model) == before and not ranges._profiling
    folder = tmp_path / "profile"
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "part: attention" in names
    table = json.loads((folder / "parts.json").read_text())
    assert table["steps"] == (2 if epochs == 1 else 3)
    parts = {row["part"]: row for row in table["parts"]}
    expected = {"load", "embed", "norms, residuals", "attention", "MLP", "head + loss", "optimiser", "HET recording"}
    assert set(parts) == expected | {"other"}
    assert sum(row["share"] for row in parts.values()) == pytest.approx(1)
    assert sum(row["ms"] for row in parts.values()) == pytest.approx(table["step_ms"])
    for name in ("embed", "norms, residuals", "attention", "MLP", "head + loss"):
        assert parts[name]["forward_ms"] > 0 and parts[name]["backward_ms"] > 0, name
    for name in ("load", "optimiser", "HET recording"):
        assert parts[name]["forward_ms"] > 0 and parts[name]["backward_ms"] == 0, name
    text = (folder / "parts.txt").read_text()
    assert all(name in text for name in parts) and "slowest operators" in text


def test_a_run_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer = make_trainer(make_toy(8), tmp_path, num_train_epochs=4, callbacks=[ProfileSteps(tmp_path, 9)])
    before = hooks(trainer.model)
    step = trainer.training_step

    def broken(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 5:
            assert ranges._profiling
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    trainer.training_step = broken
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert hooks(trainer.model) == before and not ranges._profiling
    assert not (tmp_path / "profile").exists()


def test_backward_belongs_to_the_part_that_made_it() -> None:
    """Products of known number and size, in forward and backward, whatever stands between them."""
    a, b = (torch.randn(192, 192, requires_grad=True) for _ in range(2))
    profiling(True)
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler, part("other"):
            with part("embed"):
                x = torch.zeros(4) + 1  # makes no backward function
            with part("MLP"):
                y = (a @ b).relu()
            with torch.no_grad(), part("embed"):
                x = x * 2
            with part("attention"):
                y = y @ b
            y.sum().backward()
    finally:
        profiling(False)
    table = profile_table(profiler.events(), 1, "cpu")
    calls = {entry.part: entry.calls for entry in table.operators if entry.operator == "aten::mm"}
    assert calls == {"MLP": 3, "attention": 3}
    rows = {row.part: row for row in table.parts}
    assert set(rows) == {"embed", "MLP", "attention", "other"} and rows["embed"].backward_ms == 0
    assert [row.part for row in table.parts] == [name for name in PARTS if name in rows]


def test_ranges_cost_nothing_when_off() -> None:
    assert part("MLP") is part("load")


def test_every_module_is_unmarked(tmp_path: Path) -> None:
    model: Any = make_trainer(make_toy(4), tmp_path).model
    before = hooks(model)
    handles = mark_modules(model)
    assert hooks(model) > before
    for remove in handles:
        remove()
    assert hooks(model) == before


def test_the_setting_is_checked_and_is_no_argument_of_the_trainer(tmp_path: Path) -> None:
    config = load_config("tiny", ["training.profile_steps=5"])
    assert not hasattr(training_arguments(config, tmp_path), "profile_steps")
    for value in ("-1", "x", "true", "1.5"):
        with pytest.raises(ValueError, match=r"training.profile_steps must be an integer >= 0"):
            load_config("tiny", [f"training.profile_steps={value}"])
    with pytest.raises(ValueError, match=r"did you mean profile_steps"):
        load_config("tiny", ["training.profile_step=3"])


def test_the_page_shows_the_profile_of_the_result_file() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "profiling.md").read_text(encoding="utf-8")
    result = json.loads((root / "benchmarks" / "results" / "training_log_cpu.json").read_text(encoding="utf-8"))
    found = result["parts"]
    parts = [PartTime(p["part"], p["forward_ms"], p["backward_ms"], p["device_ms"]) for p in found["parts"]]
    operators = [OperatorTime(**entry) for entry in found["operators"]]
    assert ProfileTable(found["steps"], found["device"], parts, operators).text() in page

    time = {row.part: row.ms for row in parts}
    linear = {entry.part: entry.ms for entry in operators if entry.operator == "aten::mm"}
    products = sum(e.ms for e in operators if e.operator in ("aten::addmm_", "aten::baddbmm", "aten::bmm"))
    rest = [products, time["attention"] - linear["attention"] - products, time["MLP"] - linear["MLP"]]
    rest += [time["norms, residuals"], time["head + loss"] - linear["head + loss"], time["optimiser"]]
    rest.append(sum(time[name] for name in ("load", "embed", "HET recording", "other")))
    table = page.partition("| part | over linear layers |")[2].partition("\n\n")[0].splitlines()[2:]
    shown = [float(line.split("|")[2]) for line in table]
    assert shown == [1.0, *(round(ms / sum(linear.values()), 2) for ms in rest)]

    for name, ratio in result["ratios"].items():
        assert f"{ratio['median']:.2f} [{ratio['p25']:.2f}, {ratio['p75']:.2f}]" in page or name == "log / bench"
