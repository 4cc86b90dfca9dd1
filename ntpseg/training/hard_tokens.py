"""The hard-token memory of a run: its folder, and when ranks exchange what they recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ntpseg.memory import HardTokenMemory
from ntpseg.utils.files import remove_folder

if TYPE_CHECKING:
    from ntpseg.training.config import LossConfig


def mapped_folder(loss: LossConfig, run: Path, rank: int) -> Path | None:
    """A new folder for a rank's memory if it is to be mapped: a run that goes on reads its checkpoint.

    Args:
        loss: says whether and where.
        run: the run's directory, whose name and path make the folder's in ``hard_token_path``, which runs may share.
        rank: of this process.
    """
    if loss.hard_token_storage != "mapped":
        return None
    parent = run / "hard_tokens"
    if loss.hard_token_path is not None:
        known = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:8]
        parent = Path(loss.hard_token_path).expanduser() / f"{run.name}-{known}"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"rank-{rank}"
    remove_folder(folder)
    return folder


class HardTokenExchange:
    """Starts the exchanges beside the training steps and says what they cost.

    Args:
        memory: of this rank; None: nothing is exchanged.
        every: steps between two exchanges; 0: there are none but those at the end of an epoch.
        world_size: number of ranks.
    """

    def __init__(self, memory: HardTokenMemory | None, every: int, world_size: int) -> None:
        self._memory = memory if world_size > 1 else None
        self._every = every
        self._logged = (0, 0.0)

    def step(self, number: int) -> None:
        """A step has ended, its number the same on all ranks."""
        if self._memory is not None and self._every and number % self._every == 0:
            self._memory.sync(async_op=True)

    def pop(self) -> dict[str, float]:
        """What this rank has sent since the last time, in MB (10^6 bytes), and how long training waited for it."""
        if self._memory is None:
            return {}
        sent, waited = self._memory.traffic.bytes_sent, self._memory.traffic.seconds_waited
        before, self._logged = self._logged, (sent, waited)
        return {"het_sent_mb": (sent - before[0]) / 1e6, "het_wait_seconds": waited - before[1]}
