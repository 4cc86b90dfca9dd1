"""What was measured outlives the process, and a file that is damaged only costs a measurement."""

from __future__ import annotations

import json
import logging

import pytest

from ntpseg.utils.tuning_cache import cache_file, read_choice, save_choice


def test_where_the_file_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.delenv("NTPSEG_CACHE", raising=False)
    assert cache_file("a.json") == tmp_path / "x" / "ntpseg" / "a.json"
    monkeypatch.setenv("NTPSEG_CACHE", str(tmp_path / "own"))
    assert cache_file("a.json") == tmp_path / "own" / "a.json"


def test_cases_of_other_devices_and_versions_stay(tmp_path) -> None:
    path = tmp_path / "deep" / "a.json"
    assert read_choice(path, "gpu", "1", "case") is None
    for device, version, case in (("gpu", "1", "a"), ("gpu", "2", "a"), ("cpu", "1", "a"), ("gpu", "1", "b")):
        save_choice(path, device, version, case, {"is": device + version + case})
    save_choice(path, "gpu", "1", "a", {"is": "new"})
    assert read_choice(path, "gpu", "1", "a") == {"is": "new"}
    assert read_choice(path, "gpu", "2", "a") == {"is": "gpu2a"}
    assert read_choice(path, "cpu", "1", "a") == {"is": "cpu1a"}
    assert read_choice(path, "gpu", "1", "b") == {"is": "gpu1b"}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"], "no temporary name is left"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 2, "choices": {}}', '{"format": 1}', '{"format": 1, "choices": {"gpu": 3}}'],
)
def test_a_damaged_file_is_ignored_with_one_line_and_replaced(tmp_path, caplog, content) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "ntpseg"):
        assert read_choice(path, "gpu", "1", "a") is None
        assert read_choice(path, "gpu", "1", "a") is None
        save_choice(path, "gpu", "1", "a", {"is": "new"})
    assert len(caplog.records) == 1 and str(path) in caplog.text and caplog.text.count("\n") == 1
    assert json.loads(path.read_text()) == {"format": 1, "choices": {"gpu": {"1": {"a": {"is": "new"}}}}}


@pytest.mark.parametrize("entry", ['"text"', "3", "null"])
def test_an_entry_that_is_none(tmp_path, entry) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"format": 1, "choices": {"gpu": {"1": {"a": ' + entry + "}}}}")
    assert read_choice(path, "gpu", "1", "a") is None


def test_a_folder_that_cannot_be_made(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.json"
    with caplog.at_level(logging.WARNING, "ntpseg"):
        save_choice(path, "gpu", "1", "a", {})
    assert "could not be written" in caplog.text or "ignored" in caplog.text
