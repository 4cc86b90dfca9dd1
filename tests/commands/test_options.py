"""Help texts name what the registries hold, and the program starts without what its commands need."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.commands.options import choices
from ntpseg.data import LAYOUTS
from ntpseg.generation import METHODS


def test_choices() -> None:
    assert choices(("a", "b", "auto")) == "a, b or auto."


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (("data", "check"), (*LAYOUTS, "auto")),
        (("tokenizer", "encode"), (*LAYOUTS, "auto")),
        (("eval",), (*LAYOUTS, *METHODS)),
        (("predict",), tuple(METHODS)),
    ],
)
def test_help_names_every_entry(command: tuple[str, ...], names: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(name in result.output for name in names)


def test_the_program_starts_without_heavy_imports() -> None:
    heavy = ("torch", "numpy", "transformers", "pandas", "PIL")
    script = f"import sys, ntpseg.cli; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
