"""Gives a test run the native operators: those of the installation, else a build of the checkout."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ntpseg
from ntpseg.ops import extension

ROOT = Path(__file__).resolve().parent.parent


def ensure_built(folder: Path) -> None:
    if extension.usable("cpu"):
        return
    environment = {**os.environ, "NTPSEG_SKIP_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    ntpseg.__path__.append(str(folder / "lib" / "ntpseg"))
    extension._reasons.clear()
    assert extension.usable("cpu"), extension.extension_status()


@contextlib.contextmanager
def native(wanted: bool) -> Iterator[None]:
    """Run with or without the native CPU operators."""
    reasons = dict(extension._reasons)
    extension._reasons["cpu"] = None if wanted else "switched off by a test"
    try:
        yield
    finally:
        extension._reasons.update(reasons)
