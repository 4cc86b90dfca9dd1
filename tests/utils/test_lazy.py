"""Lazy exports: every public name resolves, and importing the package alone imports nothing heavy."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PACKAGES = (
    "ntpseg",
    "ntpseg.data",
    "ntpseg.data.layouts",
    "ntpseg.evaluation",
    "ntpseg.generation",
    "ntpseg.models",
    "ntpseg.training",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_export_resolves_and_no_other_name_does(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_alone_imports_nothing_heavy(package: str) -> None:
    script = f"import sys, {package}; print([m for m in ('torch', 'numpy', 'transformers', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
