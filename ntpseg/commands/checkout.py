"""Commands that run a module of benchmarks/, which is part of a checkout, not of the installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ntpseg


def run_in_checkout(command: str, module: Sequence[str]) -> int:
    """Run ``python -m`` with these arguments beside the package's sources; returns the exit code.

    Raises:
        ValueError: there is no benchmarks/ beside the package.
    """
    root = Path(ntpseg.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "command.py").is_file():
        raise ValueError(
            f"benchmarks/ must be in {root}, got none: it is part of a checkout, not of the installed package; "
            f"clone the repository and run ntpseg {command} there"
        )
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, "-m", *module], env={**os.environ, "PYTHONPATH": path}).returncode
