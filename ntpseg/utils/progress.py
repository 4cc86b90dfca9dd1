"""Progress bars of long jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# ``callback(stage, done, total)``, called after each step of a stage.
StageCallback = Callable[[str, int, int], None]


@contextmanager
def stage_progress(console: Console | None = None, *, enabled: bool = True) -> Iterator[StageCallback]:
    """Show one bar for each stage that ``callback(stage, done, total)`` names, while the block runs.

    Args:
        console: where to draw, if that is a terminal or a notebook: a log gains nothing by bars; stderr by default.
        enabled: False draws nothing.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console(stderr=True)
    drawn = enabled and (console.is_terminal or console.is_jupyter)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not drawn) as bars:
        tasks: dict[str, TaskID] = {}

        def callback(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield callback


@contextmanager
def progress_bar(stage: str, total: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Show one bar on stderr while the block runs; the function that it yields advances the bar by a number."""
    with stage_progress(enabled=enabled) as callback:
        callback(stage, 0, total)
        yield counter(callback, stage, total)


def counter(callback: StageCallback, stage: str, total: int) -> Callable[[int], None]:
    """A function that adds to what is done of a stage and reports the sum to `callback`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        callback(stage, done, total)

    return advance


def disable_loading_bars() -> None:
    """Keep transformers from drawing a bar for every file of weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()
