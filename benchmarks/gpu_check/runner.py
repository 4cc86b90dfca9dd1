"""One step of a stage: a process with a limit, whose output is kept whatever becomes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.environment import ROOT

_GRACE = 8.0  # seconds between asking a process to end, which lets pytest write its failures, and killing it
# Seconds between the end of a process by its own limit, which starts after the imports, and its interruption.
_MARGIN = 15.0
_TAIL = 12
# Stands in a command for the seconds after which the process ends by itself.
OWN_LIMIT = "{own limit}"


def time_limit(seconds: Sequence[float], left: float) -> float:
    """Seconds for the first of some steps: its share, by what they were given, of what is left.

    A slow step takes nothing from those after it, a fast one leaves them more.
    """
    return seconds[0] / sum(seconds) * left


def own_limit(limit: float) -> int:
    """What `OWN_LIMIT` stands for in a step that may take `limit` seconds."""
    return max(1, int(limit - _GRACE - _MARGIN))


def run_step(
    name: str, command: Sequence[str], limit: float, environment: dict[str, str], logs: Path
) -> dict[str, Any]:
    """Runs one, shows and keeps its output; "passed", "failed (code)" or "out of time"."""
    print(f"\n== {name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    if limit <= _GRACE:
        return {"step": name, "seconds": 0.0, "result": "out of time", "tail": []}
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{name}.log"
    command = [str(own_limit(limit)) if part == OWN_LIMIT else part for part in command]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=_heed_interrupts, **pipes
        ) as process,
        subprocess.Popen(["tee", str(log)], stdin=process.stdout) as tee,
    ):
        result = _wait(process, limit)
        with contextlib.suppress(subprocess.TimeoutExpired):
            tee.wait(timeout=_GRACE)
        tee.kill()  # whoever left the group still holds the pipe
    tail = log.read_text(errors="replace").splitlines()[-_TAIL:]
    return {"step": name, "seconds": round(time.monotonic() - start, 2), "result": result, "tail": tail}


def _heed_interrupts() -> None:
    # what a shell starts in the background ignores them, and so do its children
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen[bytes], limit: float) -> str:
    try:
        code = process.wait(timeout=limit - _GRACE)
        return "passed" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        # an interrupt first: pytest then reports what has failed so far, and a benchmark has written its rows
        for how, grace in ((signal.SIGINT, _GRACE), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)  # the group: a benchmark may have children of its own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace)
                if how == signal.SIGKILL:
                    break
    return "out of time"


def archive(folder: Path, path: Path) -> None:
    """Packs the results and logs of a stage, the results first; whole or absent."""
    partial = path.with_name(path.name + ".part")
    with tarfile.open(partial, "w:gz") as file:
        for part in ("results", "logs"):
            if (folder / part).is_dir():
                file.add(folder / part, arcname=part)
    partial.replace(path)
