"""`ntpseg env` tells what is there, and why not where something is not."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from ntpseg import environment
from ntpseg.cli import app


def test_versions_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package-anywhere"))
    result = environment.versions()
    assert result["torch"] == torch.__version__
    assert result["no-such-package-anywhere"] == "not installed"


def test_reasons_are_given_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = environment.backends()
    assert result["loss torch"] == "usable"
    assert result["loss triton"].startswith("not usable: ")
    assert (
        "flash_attn is not installed" in result["attention flash_attention_2"]
        or "no CUDA" in result["attention flash_attention_2"]
    )


def test_the_interpreter_makes_triton_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert environment.backends()["loss triton"] == "usable"


def test_command_prints_tables_and_json() -> None:
    plain = CliRunner().invoke(app, ["env"])
    assert plain.exit_code == 0 and "ranking op, cpu" in plain.stdout
    parsed = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert set(parsed) == {"versions", "devices", "backends"}
