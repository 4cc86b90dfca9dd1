"""The ``ntpseg doctor`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ntpseg.cluster.doctor import Diagnosis


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(doctor)


def doctor(
    data: Annotated[
        Path | None, typer.Option(help="Data set that every rank must see alike: a folder, or a packed set's URL.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder that runs are written to.")] = Path(),
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for a rank at each step.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check the ranks of a launch: ``torchrun ... -m ntpseg.cli doctor --data DATA``, before the run itself.

    Exit code 0: a run can start; 1: ranks differ in what must be alike; 2: a rank or a connection is missing.
    """
    import json

    from ntpseg.cluster.doctor import diagnose

    diagnosis = diagnose(data, output, timeout)
    if diagnosis is None:  # rank 0 tells
        return
    if as_json:
        typer.echo(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        _print(diagnosis)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _print(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("rank", "host", "device", "free memory", "free disk", "TFLOP/s", "clock", title="ranks")
    for each, ahead in zip(diagnosis.facts, diagnosis.skew, strict=True):
        sizes = (f"{size / 2**30:.1f} GiB" for size in (each.free_memory, each.free_disk))
        table.add_row(str(each.rank), each.host, each.device, *sizes, f"{each.flops / 1e12:.2f}", f"{ahead:+.3f} s")
    console.print(table)
    shared = diagnosis.facts[0].versions
    console.print("versions on rank 0: " + ", ".join(f"{name} {version}" for name, version in shared.items()))
    for backend, rates in diagnosis.bandwidth.items():
        text = ", ".join(f"{size >> 20} MiB {rate / 1e9:.2f} GB/s" for size, rate in rates.items())
        console.print(f"{backend}: all-reduce (bus bandwidth) {text}")
    for finding in diagnosis.findings:
        console.print(("[red]must be mended: [/red]" if finding.fatal else "[yellow]note: [/yellow]") + finding.text)
    if diagnosis.healthy:
        count = len(diagnosis.facts)
        console.print(f"{count} {'rank' if count == 1 else 'ranks'}: a run can start")
