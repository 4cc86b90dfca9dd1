"""Two ranks over gloo, forked from a program that has everything imported.

torchrun would import it in a process of its own and then in each rank, which takes longer than most of these trainings.
What torchrun itself does is tested where it matters: `test_pixel_ranks`, `test_launch`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

HERE = Path(__file__).parent
RANKS = 2


def start(main: Callable[..., None], *args: Any) -> None:
    """Call `main` in each rank; nothing may have been computed before, whose threads a fork would not have.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one failed, with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_rank, (port, main, args), nprocs=RANKS, start_method="fork")


def _rank(index: int, port: int, main: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update({"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(RANKS)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    main(*args)


def run(script: str, *arguments: str, **environment: str) -> str:
    """Run one of this folder's programs; what it wrote to standard error."""
    known = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stderr
