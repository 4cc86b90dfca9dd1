"""The measurement of a large hard-token memory writes its own result file, with how and where it was taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import het_scale
from benchmarks.harness.rows import RESULTS

SMALL = ("--samples", "3000", "--entries", "4", "--batch", "64", "--measured", "3")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(het_scale, "small_step", lambda: lambda: sum(range(10_000)))


def test_all_is_written(tmp_path: Path) -> None:
    arguments = [*SMALL, "--folder", str(tmp_path), "--out", str(tmp_path / "out.json")]
    het_scale.main(arguments)
    written, committed = (json.loads(path.read_text()) for path in (tmp_path / "out.json", RESULTS / "het_scale.json"))
    assert written["command"] == f"python -m benchmarks.het_scale {' '.join(arguments)}"
    assert written["environment"]["commit"] and written["measured"] == 3
    # What the documents cite has the form of what the script writes.
    assert committed.keys() - {"measured"} == written.keys() - {"measured"}
    for part in ("fill", "epoch_2", "epoch_3", "checkpoint", "resident_bytes", "index"):
        assert committed[part].keys() == written[part].keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_what_was_measured_before_it_broke_off_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(het_scale, "checkpoints", full)
    with pytest.raises(OSError, match="No space"):
        het_scale.main([*SMALL, "--folder", str(tmp_path), "--out", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert "epoch_2" in written and "checkpoint" not in written
