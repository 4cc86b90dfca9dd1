"""The ``ntpseg reproduce`` command: runs a study of benchmarks/accuracy, which is part of a checkout."""

from __future__ import annotations

from typing import Annotated

import typer

from ntpseg.commands.checkout import run_in_checkout


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    # Unknown options are the study's own; `ntpseg reproduce qata --options` lists them.
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(reproduce)


def reproduce(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="qata: QaTa-COV19-v2, from its raw folder.")],
    data: Annotated[str | None, typer.Argument(help="The raw folder.")] = None,
    options: Annotated[bool, typer.Option("--options", help="List the further options and stop.")] = False,
) -> None:
    """Train and score every model of a study, ours and the baselines, and write its tables; goes on where it stopped.

    Further options: --out, --minutes, --seeds, --groups, --only, --threads, --jobs, --list.
    """
    arguments = [study, *([data] if data else []), *context.args, *(["--help"] if options else [])]
    raise typer.Exit(run_in_checkout("reproduce", ["benchmarks.accuracy.reproduce", *arguments]))
