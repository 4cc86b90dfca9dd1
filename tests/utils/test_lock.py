"""A folder's lock: one process at a time, free again when that process is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ntpseg.utils.lock import folder_lock

ROOT = Path(__file__).parents[2]
# The child of the holder outlives it, as a data loader's worker does.
HOLDER = """
import os, sys, time
from pathlib import Path
from ntpseg.utils.lock import folder_lock
with folder_lock(Path(sys.argv[1]), "output"):
    child = os.fork()
    if child:
        print(os.getpid(), child, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None
    pid, child = map(int, holder.stdout.readline().split())
    try:
        message = (
            rf"output must be written by one process at a time, got '.*run', into which process {pid} on \S+ writes"
        )
        with pytest.raises(ValueError, match=message), folder_lock(run, "output"):
            pass
        os.kill(pid, signal.SIGKILL)
        holder.wait()
        with folder_lock(run, "output"):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_one_process_does_not_take_it_twice(tmp_path: Path) -> None:
    again = pytest.raises(ValueError, match=rf"this process \({os.getpid()}\)")
    with folder_lock(tmp_path, "output"), again, folder_lock(tmp_path, "output"):
        pass
    with folder_lock(tmp_path, "output"):
        pass
