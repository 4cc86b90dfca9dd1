"""Named parts of a training step for the profiler; while nobody profiles they cost one comparison."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

PREFIX = "part: "
_NOTHING: AbstractContextManager[Any] = nullcontext()
_profiling = False


def profiling(on: bool) -> None:
    """Whether `part` marks anything, in the whole process."""
    global _profiling
    _profiling = on


def part(name: str) -> AbstractContextManager[Any]:
    """A block that belongs to part `name` of a step, a `torch.profiler.record_function` while a profile is taken."""
    if not _profiling:
        return _NOTHING
    from torch.profiler import record_function

    return record_function(PREFIX + name)
