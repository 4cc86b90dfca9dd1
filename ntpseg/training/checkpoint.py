"""Checkpoints that survive being killed at any moment, and the hard-token memory beside them.

A checkpoint is written in this order: a manifest that says "unfinished", the files of all ranks, a barrier, and the
manifest with the size and hash of each. Only then are older checkpoints removed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntpseg.memory.snapshot import UnreadableFile
from ntpseg.training.pickles import NEVER_READ, find_unsafe
from ntpseg.utils.files import fsync_path, remove_folder, write_json
from ntpseg.utils.manifest import MANIFEST, damage, linked_hashes, unreadable, write_manifest

if TYPE_CHECKING:
    from ntpseg.memory import HardTokenMemory

_STATE = "trainer_state.json"
_UNFINISHED = {"unfinished": True}
_DAMAGED = "damaged-"
# Found whole by this process: large checkpoints take minutes to hash.
_whole: set[Path] = set()


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """All checkpoint folders of a run with their steps, ascending."""
    matches = ((path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in run.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for path, match in matches if match)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, whatever has happened to it since."""
    manifest = _json(checkpoint / MANIFEST)
    if manifest is not None or (checkpoint / MANIFEST).is_file():
        return manifest != _UNFINISHED
    return _json(checkpoint / _STATE) is not None


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint; None if there is none."""
    return next((path for _, path in reversed(checkpoints(run)) if is_complete(path)), None)


def drop_incomplete(run: Path) -> list[Path]:
    """Remove checkpoints that a killed run left half-written; they would count as the newest."""
    broken = [path for _, path in checkpoints(run) if not is_complete(path)]
    for path in broken:
        remove_folder(path)
    return broken


def choose_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is whole; newer ones are renamed to ``damaged-checkpoint-N``, a line for each.

    Returns:
        None where no checkpoint was ever written to its end.

    Raises:
        ValueError: there are checkpoints, and none of them is whole.
    """
    for path in drop_incomplete(run):
        print(f"removed the incomplete checkpoint {path}", file=sys.stderr)
    faults: list[tuple[Path, str]] = []
    for _, path in reversed(checkpoints(run)):
        wrong = fault(path)
        if wrong is None:
            for damaged, reason in faults:
                aside = damaged.with_name(_DAMAGED + damaged.name)
                remove_folder(aside)
                os.rename(damaged, aside)
                print(f"left out {damaged.name}: {reason} (now {aside.name}); {path.name} is whole", file=sys.stderr)
            fsync_path(run)
            if not (path / MANIFEST).is_file():
                print(
                    f"{path} is of an earlier release, without the hashes of its files: each can be read, no more is "
                    "known of them",
                    file=sys.stderr,
                )
            _whole.add(path.resolve())
            return path
        faults.append((path, wrong))
    if faults:
        found = "; ".join(f"{path.name}: {reason}" for path, reason in faults)
        raise ValueError(
            f"resume must find a whole checkpoint in {str(run)!r}, got none ({found}); restore one, or start again "
            "with --overwrite"
        )
    return None


def fault(checkpoint: Path) -> str | None:
    """Why training cannot go on from a checkpoint, in one line; None where it can.

    Checked are the size and hash of every file, that no part of the state is missing, and what its pickles call. A
    checkpoint of a release before 0.2 has no manifest; that its files can be read is checked then.
    """
    if (checkpoint / MANIFEST).is_file():
        wrong = damage(checkpoint)
    elif (checkpoint / NEVER_READ).is_file():
        wrong = _unreadable(checkpoint)
    else:
        wrong = f"{MANIFEST} is missing"
    return wrong or _missing(checkpoint) or find_unsafe(checkpoint)


def check_resumable(checkpoint: Path, rank: int) -> None:
    """Raise a `ValueError` where training cannot go on from a checkpoint, see `fault`; only rank 0 checks hashes."""
    hashed = rank != 0 or checkpoint.resolve() in _whole
    wrong = find_unsafe(checkpoint) if hashed else fault(checkpoint)
    if wrong is not None:
        raise ValueError(f"checkpoint must be whole and hold data alone, got {str(checkpoint)!r}, where {wrong}")


def begin(checkpoint: Path) -> None:
    """Make the folder of a new checkpoint in place of what is there; it counts as half-written until `finish`."""
    _whole.discard(checkpoint.resolve())
    remove_folder(checkpoint)
    write_json(checkpoint / MANIFEST, _UNFINISHED)


def finish(checkpoint: Path) -> None:
    """Declare a checkpoint whole; call it when all ranks have written their files.

    The Trainer's pickled arguments are left out: nothing reads them, and a pickle that is read can run anything.
    """
    (checkpoint / NEVER_READ).unlink(missing_ok=True)
    # Parts of a mapped memory that an earlier checkpoint holds too were hashed for that one.
    earlier = [path for _, path in checkpoints(checkpoint.parent) if path != checkpoint]
    write_manifest(checkpoint, known=linked_hashes(checkpoint, earlier))
    fsync_path(checkpoint.parent)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; the newest and `best` stay. Each is renamed before it is deleted.

    Args:
        run: the run's folder.
        limit: ``save_total_limit``; None or 0 keeps all.
        best: path of the best checkpoint, if one is known.
    """
    paths = [path for _, path in checkpoints(run)]
    # By name: the run's folder may have been moved since.
    kept = [path for path in paths if path == paths[-1] or (best and path.name == Path(best).name)]
    if not limit or limit < 0:
        return
    surplus = len(paths) - max(limit, len(kept))
    for path in [path for path in paths if path not in kept][: max(surplus, 0)]:
        remove_folder(path)


def memory_file(checkpoint: Path, rank: int) -> Path:
    """Where a rank's hard-token memory is kept: within an epoch each rank has recorded other samples."""
    return checkpoint / f"hard_tokens_{rank}.pt"


def save_memory(memory: HardTokenMemory, checkpoint: Path, rank: int) -> None:
    """Write a rank's memory; the file appears complete or not at all. A mapped one has parts beside it."""
    memory.save(memory_file(checkpoint, rank))


def load_memory(
    memory: HardTokenMemory, checkpoint: Path, rank: int, world_size: int = 1, **limits: int | None
) -> None:
    """Restore a rank's memory, whatever the number of ranks that wrote it.

    Rank r takes what ranks r, r + W, r + 2 W ... of the saved run recorded, W being the number of ranks now, so that
    none of it is lost; a rank that the saved run did not have takes the first one's.

    Args:
        memory: takes it.
        checkpoint: holds ``hard_tokens_0.pt`` and so on.
        rank: of this process.
        world_size: number of ranks now.
        **limits: ``vocab_size`` and ``length``, see `HardTokenMemory.load_state_dict`.

    Raises:
        ValueError: the checkpoint holds no memory, that of other data, or entries that no memory can hold.
    """
    first = memory_file(checkpoint, rank if memory_file(checkpoint, rank).is_file() else 0)
    if not first.is_file():
        raise ValueError(f"checkpoint must hold {first.name}, got none in {checkpoint}; resume with hard_tokens=0")
    _read_memory(first, memory.load, limits)
    further = rank + world_size
    while memory_file(checkpoint, further).is_file():
        _read_memory(memory_file(checkpoint, further), memory.merge, limits)
        further += world_size


def _read_memory(path: Path, take: Callable[..., None], limits: dict[str, int | None]) -> None:
    try:
        take(path, **limits)
    except UnreadableFile:
        raise
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed from: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _missing(checkpoint: Path) -> str | None:
    """The part of the state that a checkpoint lacks: the Trainer goes on without a word where it finds none."""
    zero = any(checkpoint.glob("global_step*"))
    parts = {
        "model.safetensors": ("model*.safetensors", "pytorch_model*"),
        "optimizer.pt": ("optimizer*",),
        "scheduler.pt": ("scheduler.pt",),
    }
    for name, patterns in parts.items():
        if not zero and not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"{name} is missing"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    return None


def _unreadable(checkpoint: Path) -> str | None:
    """The first file of a checkpoint without a manifest that cannot be read to its end."""
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if (reason := unreadable(path)) is not None:
            return f"{name} cannot be read ({reason})"
        try:
            if path.suffix in (".pt", ".pth", ".bin") and path.name != NEVER_READ:
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        return f"{name} is damaged"
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            return f"{name} cannot be read ({error})"
    return None if _json(checkpoint / _STATE) is not None else f"{_STATE} is missing"
