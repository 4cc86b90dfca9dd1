"""The ``ntpseg env`` command."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(env)


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print versions, devices and which backends are usable, and why not where not."""
    import json

    from ntpseg.environment import describe

    description = describe()
    if as_json:
        typer.echo(json.dumps(description, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, section in description.items():
        table = Table("name", "value", title=title, title_justify="left", show_header=False)
        for name, value in section.items():
            table.add_row(name, str(value))
        console.print(table)
