"""Checkpoints that survive being killed at any moment, and the hard-token memory beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ntpseg.utils.files import atomic_open

if TYPE_CHECKING:
    from ntpseg.memory import HardTokenMemory

_STATE = "trainer_state.json"


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """All checkpoint folders of a run with their steps, ascending."""
    matches = ((path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in run.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for path, match in matches if match)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state file last."""
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint; None if there is none."""
    return next((path for _, path in reversed(checkpoints(run)) if is_complete(path)), None)


def drop_incomplete(run: Path) -> list[Path]:
    """Remove checkpoints that a killed run left half-written; they would count as the newest."""
    broken = [path for _, path in checkpoints(run) if not is_complete(path)]
    for path in broken:
        shutil.rmtree(path)
    return broken


def memory_file(checkpoint: Path, rank: int) -> Path:
    """Where a rank's hard-token memory is kept: within an epoch each rank has recorded other samples."""
    return checkpoint / f"hard_tokens_{rank}.pt"


def save_memory(memory: HardTokenMemory, checkpoint: Path, rank: int) -> None:
    """Write a rank's memory; the file appears complete or not at all."""
    with atomic_open(memory_file(checkpoint, rank)) as file:
        torch.save(memory.state_dict(), file)


def load_memory(memory: HardTokenMemory, checkpoint: Path, rank: int) -> None:
    """Restore a rank's memory; a rank that the saved run did not have takes the first one's.

    Raises:
        ValueError: the checkpoint holds no memory, or that of other data.
    """
    path = memory_file(checkpoint, rank)
    path = path if path.is_file() else memory_file(checkpoint, 0)
    if not path.is_file():
        raise ValueError(f"checkpoint must hold {path.name}, got none in {checkpoint}; resume with hard_tokens=0")
    memory.load_state_dict(torch.load(path, weights_only=True))
