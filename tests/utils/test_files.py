"""Files and folders are complete or absent."""

from __future__ import annotations

import csv
import json
import os
import stat
from pathlib import Path

import pytest

from ntpseg.utils import files


def test_csv_and_json_keep_commas_quotes_and_unicode(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "deep" / "a.csv", ["text", "dice"], [['a, "b"\nc', 0.5], ["ü", 1]])
    with (tmp_path / "deep" / "a.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["text", "dice"], ['a, "b"\nc', "0.5"], ["ü", "1"]]
    files.write_json(tmp_path / "a.json", {"ü": None})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": None}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_complete_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    for content in ("old", "new"):
        with files.atomic_folder(path) as folder:
            (folder / content).touch()
            assert folder.name.startswith(files.TEMPORARY_FOLDER)
        assert [p.name for p in path.iterdir()] == [content]
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_a_failed_folder_leaves_the_old_one_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with files.atomic_folder(path) as folder:
        (folder / "old").touch()
    with pytest.raises(OSError, match="disk full"), files.atomic_folder(path) as folder:
        (folder / "new").touch()
        raise OSError("disk full")
    assert [p.name for p in path.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_may_not_be_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    with files.atomic_folder(path, replace=False) as folder:
        (folder / "first").touch()
    with pytest.raises(FileExistsError), files.atomic_folder(path, replace=False) as folder:
        (folder / "second").touch()
    assert [p.name for p in path.iterdir()] == ["first"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_data_is_flushed_before_the_name_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def flushed(handle: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(files.os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    monkeypatch.setattr(files.os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    files.atomic_write(tmp_path / "a", b"content")
    assert events == ["file", "rename", "folder"]
    events.clear()
    with files.atomic_folder(tmp_path / "b", replace=False) as folder:
        (folder / "one").touch()
        (folder / "two").touch()
    assert events == ["file", "file", "folder", "rename", "folder"]


def test_permissions_follow_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mask: int) -> int:
        raise AssertionError("the umask is every thread's")

    monkeypatch.setattr(os, "umask", refuse)
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    files.write_text(tmp_path / "a", "x")
    with files.atomic_folder(tmp_path / "b"):
        pass
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_lines_of_json_come_back_without_the_one_that_was_cut_off(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.jsonl", [{"step": 1, "text": "ü"}, {"step": 2}]
    assert files.read_jsonl(path) == []
    files.write_jsonl(path, rows)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert files.read_jsonl(path) == rows


def test_what_killed_writes_left_is_told_from_the_rest_and_removed(tmp_path: Path) -> None:
    for name in (".config.yaml.a1b2.tmp", "config.yaml", ".lock", "mine.tmp"):
        (tmp_path / name).touch()
    (tmp_path / f"{files.TEMPORARY_FOLDER}model.x").mkdir()
    (tmp_path / f"{files.TEMPORARY_FOLDER}model.x" / "a").touch()
    files.remove_litter(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.yaml", "mine.tmp"]


def test_json_is_strict(tmp_path: Path) -> None:
    """NaN and infinities, which no JSON has, become null wherever they stand."""
    value = {"a": float("nan"), "b": [1.5, float("inf"), {"c": (-float("inf"), 2)}], "d": "NaN"}
    files.write_json(tmp_path / "a.json", value)
    files.write_jsonl(tmp_path / "a.jsonl", [value])
    for name in ("a.json", "a.jsonl"):
        text = (tmp_path / name).read_text()
        assert json.loads(text, parse_constant=pytest.fail) == {
            "a": None,
            "b": [1.5, None, {"c": [None, 2]}],
            "d": "NaN",
        }
