"""The ``ntpseg bench`` command: runs the suite in benchmarks/, which is part of a checkout, not of the package."""

from __future__ import annotations

from typing import Annotated

import typer

_HELP = "loss, topn, attention, decode, train, all; or report: tables and plots from the rows that are there."


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
    import os
    import subprocess
    import sys
    from pathlib import Path

    import ntpseg

    root = Path(ntpseg.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "command.py").is_file():
        raise ValueError(
            f"benchmarks/ must be in {root}, got none: it is part of a checkout, not of the installed package; "
            "clone the repository and run ntpseg bench there"
        )
    command = [sys.executable, "-m", "benchmarks", what, *(["--quick"] if quick else []), *context.args]
    command += ["--base", base] if base else []
    command += ["--help"] if options else []
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    raise typer.Exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)
