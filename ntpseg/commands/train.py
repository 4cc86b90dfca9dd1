"""The ``ntpseg train`` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ntpseg.commands.options import SkipBad


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(train)


def train(
    config: Annotated[
        str, typer.Argument(help="Name of a ready configuration, a YAML file, or a run.", metavar="CONFIG")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that override it, such as model.k=1 output=runs/a.", metavar="KEY=VALUE"),
    ] = None,
    deepspeed: Annotated[str | None, typer.Option(help="zero1, zero2, zero3, or a DeepSpeed JSON file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the existing run.")] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Train a segmenter: check the data, make tokenizers and tokens, train, save it to OUTPUT/model.

    Start it with torchrun for several processes.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ntpseg.training import load_config
    from ntpseg.training import train as run_training
    from ntpseg.training.distributed import rank
    from ntpseg.utils.progress import disable_loading_bars

    disable_loading_bars()
    settings = load_config(config, overrides or ())
    if deepspeed is not None:
        settings.deepspeed = deepspeed
    settings.data.skip_bad = settings.data.skip_bad or skip_bad
    if settings.output is None:
        settings.output = str(Path("runs") / Path(config).stem)
    run = run_training(settings, resume=resume, overwrite=overwrite)
    if rank() == 0:
        typer.echo(f"trained model: {run / 'model'}")
