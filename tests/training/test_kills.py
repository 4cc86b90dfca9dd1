"""Training survives being killed at random moments; see `kills`, whose command goes on for longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_an_unbroken_one() -> None:
    """Losses, weights, optimizer, average and hard tokens, bit for bit; ``NTPSEG_KILLS`` sets the number of kills."""
    kills = int(os.environ.get("NTPSEG_KILLS", "20"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), "--kills", str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + 20 * kills)
    assert done.returncode == 0, done.stderr[-6000:]
    assert json.loads(done.stdout.splitlines()[-1])["kills"] >= kills
