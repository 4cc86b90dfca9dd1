"""The ``ntpseg bench`` command: runs the suite in benchmarks/, which is part of a checkout, not of the package."""

from __future__ import annotations

from typing import Annotated

import typer

from ntpseg.commands.checkout import run_in_checkout

_HELP = (
    "loss, topn, attention, decode, train, all; report: tables and plots from the rows that are there; "
    "tune: choose the loss's tile for this GPU and keep the choice."
)


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    # Unknown options are the suite's own; `ntpseg bench loss --options` lists them.
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def bench(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help=_HELP)] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="A small grid and few rounds.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Git revision to compare with, in turns; exit code 1 if slower.")
    ] = None,
    options: Annotated[bool, typer.Option("--options", help="List the further options and stop.")] = False,
) -> None:
    """Measure this package beside its peers on this machine's GPU, or else its CPU; rows go to benchmarks/results/."""
    # An unknown option in front of the benchmark is `what`, and its value the next argument: the order must stay.
    arguments = [what, *context.args, *(["--quick"] if quick else []), *(["--base", base] if base else [])]
    raise typer.Exit(run_in_checkout("bench", ["benchmarks", *arguments, *(["--help"] if options else [])]))
