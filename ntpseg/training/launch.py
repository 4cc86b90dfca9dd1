"""Whether a start goes on with a run that is there: ``--autoresume``, and torchrun's own restarts."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ntpseg.utils.files import write_text

# Of the launch that began or last resumed a run, for the restarts of the same launch.
LAUNCH = ".launch"


def launch_id() -> str | None:
    """What the restarts of one torchrun have in common; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    # Without a rendezvous id all launches have the same one; the agent, which starts this process, outlives restarts.
    return name if name != "none" else f"{socket.gethostname()}:{os.getppid()}"


def is_restart(run: Path) -> bool:
    """Whether torchrun has started this process anew (``--max-restarts``), for a run that this launch has in hand."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    try:
        return (run / LAUNCH).read_text(encoding="utf-8") == launch_id()
    except OSError:
        return False


def mark(run: Path) -> None:
    """Note in a run that this launch has it in hand; called by rank 0 once what was there before is gone."""
    name = launch_id()
    if name is None:
        (run / LAUNCH).unlink(missing_ok=True)
    else:
        write_text(run / LAUNCH, name)
