"""The choice of tuning: written, read, and passed over where it cannot be used."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from ntpseg.kernels import tuned_configs
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, GemmConfig
from ntpseg.kernels.tuned_configs import cache_file, configs_for, read_choice, save_choice

TILE = GemmConfig(128, 128, 64, num_warps=4, num_stages=3, TMA=True, EPILOGUE_SUBTILE=2, ctas_per_sm=2)
CARD = "NVIDIA H200"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NTPSEG_CACHE", str(tmp_path / "cache"))
    configs_for.cache_clear()
    return tmp_path / "cache"


def test_where_it_lies(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_file() == folder / "gemm.json"
    monkeypatch.delenv("NTPSEG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "ntpseg" / "gemm.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file() == tmp_path / "home" / ".cache" / "ntpseg" / "gemm.json"


def test_comes_back_for_its_device_and_version_only(folder: Path) -> None:
    path = save_choice(CARD, "3.6.0", TILE, {"ratio": 0.97, "shapes": [[6272, 1024, 32768]]})
    assert read_choice(CARD, "3.6.0") == TILE
    assert read_choice(CARD, "3.9.0") is None and read_choice("NVIDIA A100", "3.6.0") is None
    assert [item.name for item in folder.iterdir()] == [path.name]
    assert json.loads(path.read_text())["choices"][CARD]["3.6.0"]["ratio"] == 0.97


def test_choices_of_others_stay() -> None:
    other = dataclasses.replace(TILE, GROUP_SIZE_M=16)
    save_choice(CARD, "3.6.0", TILE, {})
    save_choice(CARD, "3.9.0", other, {})
    save_choice("NVIDIA A100", "3.6.0", other, {})
    save_choice(CARD, "3.6.0", None, {})
    assert read_choice(CARD, "3.6.0") is None
    assert read_choice(CARD, "3.9.0") == read_choice("NVIDIA A100", "3.6.0") == other


def test_without_a_file_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert read_choice(CARD, "3.6.0") is None and not caplog.messages


def _file(forward: object) -> str:
    return json.dumps({"format": 1, "choices": {CARD: {"3.6.0": {"forward": forward}}}})


FIELDS = dataclasses.asdict(TILE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        (_file(FIELDS)[:-30], "Unterminated string"),
        ("[]", "format must be 1"),
        ('{"format": 2, "choices": {}}', "format must be 1"),
        ('{"format": 1, "choices": []}', "format must be 1"),
        (json.dumps({"format": 1, "choices": {CARD: 3}}), "attribute"),
        (json.dumps({"format": 1, "choices": {CARD: {"3.6.0": {}}}}), "forward"),
        (json.dumps({"format": 1, "choices": {CARD: {"3.6.0": 7}}}), "subscriptable"),
        (_file([128, 128]), "fields of a tile, got list"),
        (_file({**FIELDS, "WARP": 1}), "got 'WARP'"),
        (_file({name: FIELDS[name] for name in FIELDS if name != "BLOCK_K"}), "forward must have BLOCK_K"),
        (_file({**FIELDS, "BLOCK_M": 100}), "BLOCK_M must be a value that a tile can have, got 100"),
        (_file({**FIELDS, "BLOCK_M": "128"}), "BLOCK_M"),
        (_file({**FIELDS, "num_warps": True}), "num_warps"),
        (_file({**FIELDS, "num_stages": 0}), "num_stages"),
        (_file({**FIELDS, "TMA": 1}), "TMA must be a value that a tile can have, got 1"),
    ],
)
def test_damaged_or_foreign_files_are_ignored(
    folder: Path, text: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    cache_file().write_text(text)
    with caplog.at_level(logging.WARNING, "ntpseg.kernels"):
        assert read_choice(CARD, "3.6.0") is None
    (message,) = caplog.messages
    assert str(cache_file()) in message and reason in message and "\n" not in message
    save_choice(CARD, "3.6.0", TILE, {})  # and replaced
    assert read_choice(CARD, "3.6.0") == TILE


@pytest.mark.parametrize("kind", ["folder", "binary"])
def test_not_even_a_text_file(folder: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    if kind == "folder":
        cache_file().mkdir(parents=True)
    else:
        folder.mkdir()
        cache_file().write_bytes(b"\xff\xfe\x00")
    assert read_choice(CARD, "3.6.0") is None and len(caplog.messages) == 1


def test_goes_before_the_table_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(tuned_configs, "triton_version", lambda: "3.6.0")
    assert configs_for(device) == GEMM_CONFIGS["sm_90"]
    save_choice(CARD, "3.6.0", TILE, {})
    assert configs_for(device) == GEMM_CONFIGS["sm_90"]  # read once a process
    configs_for.cache_clear()
    assert configs_for(device) == dataclasses.replace(GEMM_CONFIGS["sm_90"], forward=TILE)
    configs_for.cache_clear()


def test_the_interpreter_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_configs, "cache_file", lambda: pytest.fail("the file was looked for"))
    assert configs_for(torch.device("cpu")) == GEMM_CONFIGS["interpreter"]
