"""A pytest plugin: ``ntpseg._C`` is the sanitized build in the folder that NTPSEG_SANITIZED_BUILD names."""

from __future__ import annotations

import os
from pathlib import Path

import ntpseg

FOLDER = Path(os.environ["NTPSEG_SANITIZED_BUILD"]) / "ntpseg"


def pytest_configure() -> None:
    """Puts the build before the installed one; a run over that would find nothing and look the same."""
    ntpseg.__path__.insert(0, str(FOLDER))
    import ntpseg._C as extension

    file = Path(str(extension.__file__))
    assert file.parent == FOLDER, f"{file} must be the sanitized build in {FOLDER}"
    code = file.read_bytes()
    assert b"__asan_report_store" in code and b"__ubsan_handle" in code, f"{file} must be sanitized"
