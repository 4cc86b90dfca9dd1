"""The ``ntpseg report`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(report)


def report(
    run: Annotated[Path, typer.Argument(help="A run of `ntpseg train`.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="HTML file; RUN/report.html by default.")] = None,
    split: Annotated[str | None, typer.Option(help="Evaluated split to show; test if there is one.")] = None,
    examples: Annotated[int, typer.Option(help="Best, median and worst cases shown, each.", min=1)] = 3,
    grey: Annotated[bool, typer.Option("--grey", help="Show colour images in grey (CT windows as colours).")] = False,
    hide_names: Annotated[
        bool, typer.Option("--hide-names", help="Numbers in place of the names of cases, subjects and files.")
    ] = False,
) -> None:
    """Write one HTML file with metrics, curves, overlays and lines of equal probability (run `ntpseg eval` first)."""
    from rich.console import Console

    from ntpseg.evaluation.report import write_report
    from ntpseg.evaluation.run_directory import run_directory

    target = write_report(run_directory(run), out, split=split, examples=examples, grey=grey, hide_names=hide_names)
    Console().print(f"report: {target}", highlight=False, soft_wrap=True)
