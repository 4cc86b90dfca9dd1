"""The ``ntpseg pack`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(pack)


def pack(
    run: Annotated[Path, typer.Argument(help="A run of `ntpseg train`.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file, ending in .zip.", show_default=False)],
    license_name: Annotated[str, typer.Option("--license", help="Of the weights, such as MIT or CC-BY-4.0.")],
    data: Annotated[str, typer.Option(help="What it was trained on, with the attribution that is due.")],
    title: Annotated[str, typer.Option(help="Name on the model card.")] = "ntpseg model",
) -> None:
    """Put a trained model and its model card into one file, which predict and eval take as --model."""
    from ntpseg.evaluation.model_card import model_card
    from ntpseg.evaluation.run_directory import run_directory
    from ntpseg.models.archive import SUFFIX, pack_bundle
    from ntpseg.models.bundle import bundle_directory, bundle_files
    from ntpseg.utils.outputs import check_file, check_not_inputs, is_inside

    root = run_directory(run)
    check_file("--out", out, (SUFFIX,))
    check_not_inputs("--out", [out], [*bundle_files(root), root / "config.yaml"])
    if is_inside(out, root / "model" if (root / "model").is_dir() else root) and root.is_dir():
        raise ValueError(f"--out must be outside of the folder that is packed, got {out}; choose another place")
    target = pack_bundle(bundle_directory(root), out, model_card(root, title, license_name, data))
    typer.echo(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")
