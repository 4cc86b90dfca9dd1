"""A manifest tells any damage of the files that it names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ntpseg.utils import manifest
from ntpseg.utils.files import write_json
from ntpseg.utils.manifest import MANIFEST, check_folder, damage, file_digest, write_json_member, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.bin", "deep/b.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(range(256)) * 4)
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def test_a_whole_folder_is_whole_whatever_lies_beside(folder: Path) -> None:
    assert damage(folder) is None
    assert json.loads((folder / MANIFEST).read_text())["bytes"] == {"a.bin": 1024, "deep/b.bin": 1024, "empty": 0}
    (folder / "note.txt").write_text("mine")
    assert damage(folder) is None


def test_the_digest_is_sha256(folder: Path) -> None:
    assert file_digest(folder / "a.bin") == hashlib.sha256(bytes(range(256)) * 4).hexdigest()
    assert file_digest(folder / "a.bin") == json.loads((folder / MANIFEST).read_text())["sha256"]["a.bin"]


@pytest.mark.parametrize("name", ["a.bin", "deep/b.bin"])
@pytest.mark.parametrize("bit", range(0, 8192, 577))
def test_any_bit_is_told(folder: Path, name: str, bit: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(data)
    assert damage(folder) == f"{name} is not what was written (its sha256 differs)"


def test_missing_and_cut_files_are_told(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(512))
    assert damage(folder) == "a.bin is cut off (512 of 1024 bytes)"
    (folder / "a.bin").write_bytes(bytes(2048))
    assert damage(folder) == "a.bin is too long (2048 of 1024 bytes)"
    (folder / "a.bin").unlink()
    assert damage(folder) == "a.bin is missing"
    with pytest.raises(ValueError, match=r"run must be whole, got '.*', where a.bin is missing; copy it again"):
        check_folder("run", folder, "copy it again")
    (folder / MANIFEST).unlink()
    assert damage(folder) == "manifest.json is missing"
    check_folder("run", folder, "copy it again")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"bytes": {}}',
        '{"bytes": {"a.bin": "1024"}}',
        '{"bytes": {"../a": 1}}',
        '{"bytes": {"a.bin": 1}, "x": 1}',
        '{"bytes": {"a.bin": 1024}, "sha256": {}}',
        '{"bytes": {"a.bin": 1024}, "sha256": null}',
        "[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_told(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    assert damage(folder) == "manifest.json is damaged"


@pytest.mark.parametrize("old", [None, {"a": 1}])
@pytest.mark.parametrize("until", range(4))
def test_a_file_that_is_replaced_leaves_the_folder_whole_whenever_it_is_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, old: dict | None, until: int
) -> None:
    if old is not None:
        write_json(folder / "x.json", old)
        write_manifest(folder)
    done = []

    def killed(path: Path, value: object) -> None:
        if len(done) == until:
            raise KeyboardInterrupt
        write_json(path, value)
        done.append(path)

    monkeypatch.setattr(manifest, "write_json", killed)
    try:
        write_json_member(folder, "x.json", {"b": 2})
    except KeyboardInterrupt:
        assert len(done) == until
    assert damage(folder) is None
    monkeypatch.undo()
    write_json_member(folder, "x.json", {"b": 2})
    assert damage(folder) is None and json.loads((folder / "x.json").read_text()) == {"b": 2}
    (folder / "x.json").write_text("{}")
    assert damage(folder) is not None


def test_without_a_manifest_the_file_alone_is_written(tmp_path: Path) -> None:
    write_json_member(tmp_path, "x.json", [1])
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
