"""The planned memory of real training steps, against what PyTorch's allocator gave out in them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_memory import CASES, GOAL, Blocks, Case, compare, main, merged

deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["one", pytest.param("zero2", marks=deepspeed)])
def test_plan_is_within_the_goal(sharding: str) -> None:
    row = compare(Case("tiny", sharding, 2, size=64))
    assert abs(row["error"]) <= GOAL, row
    for phase in ("forward", "step"):
        assert row["predicted_phases"][phase] == pytest.approx(row["measured_phases"][phase], rel=0.15), phase


def test_blocks_whose_free_was_not_seen_end_where_others_begin() -> None:
    blocks = Blocks()
    for address, size in ((100, 50), (200, 50), (300, 50)):
        blocks.change(address, size)
    assert blocks.bytes == 150
    blocks.change(200, -50)
    assert blocks.bytes == 100
    # It begins within the first and ends within the third.
    blocks.change(140, 170)
    assert blocks.bytes == 170
    blocks.change(999, -10)
    assert blocks.bytes == 170
    blocks.change(140, -170)
    assert blocks.bytes == 0


def test_a_case_measured_again_replaces_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [case.name for case in CASES]
    rows = [{"case": names[2], "commit": "a"}, {"case": "of another day", "commit": "a"}]
    rows = merged(rows, {"case": names[0], "commit": "b"})
    rows = merged(rows, {"case": names[2], "commit": "c"})
    assert [(row["case"], row["commit"]) for row in rows] == [(names[0], "b"), (names[2], "c"), ("of another day", "a")]
    file = tmp_path / "plan.json"

    def row(case: Case) -> dict[str, Any]:
        sizes = {"predicted_bytes": 1, "measured_bytes": 1, "error": 0.0, "measured_phases": {}}
        return {"case": case.name, "commit": "new", **sizes}

    file.write_text(json.dumps({"cases": [{"case": names[1], "error": 0.2, "commit": "old"}]}))
    monkeypatch.setattr("benchmarks.plan_memory.compare", row)
    monkeypatch.setattr("sys.argv", ["plan_memory", "--out", str(file), "--only", names[0]])
    assert main() == 1, "a case that was measured before misses the goal"
    written = json.loads(file.read_text())
    assert [(row["case"], row["commit"]) for row in written["cases"]] == [(names[0], "new"), (names[1], "old")]
    assert written["missed"] == [names[1]] and "commit" not in written
    monkeypatch.setattr("sys.argv", ["plan_memory", "--out", str(file), "--only", "tinny"])
    with pytest.raises(SystemExit):
        main()
