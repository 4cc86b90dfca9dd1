"""The ``ntpseg train`` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ntpseg.commands.options import SkipBad

if TYPE_CHECKING:
    from ntpseg.training.config import RunConfig


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
    autoresume: Annotated[
        bool,
        typer.Option("--autoresume", help="Continue from the run's last checkpoint, or start where there is no run."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the existing run.")] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Train a segmenter: check the data, make tokenizers and tokens, train, save it to OUTPUT/model.

    Start it with torchrun for several processes; its --max-restarts goes on from the last checkpoint by itself.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ntpseg.training import load_config
    from ntpseg.training import train as run_training
    from ntpseg.training.distributed import rank
    from ntpseg.training.interruption import TrainingInterrupted
    from ntpseg.utils.progress import disable_loading_bars

    disable_loading_bars()
    settings = load_config(config, overrides or ())
    if deepspeed is not None:
        settings.deepspeed = deepspeed
    settings.data.skip_bad = settings.data.skip_bad or skip_bad
    if settings.output is None:
        settings.output = str(Path("runs") / Path(config).stem)
    if autoresume and (resume or overwrite):
        raise ValueError(f"--autoresume must be given alone, got {'--resume' if resume else '--overwrite'} with it")
    if not resume:
        _check_output(settings, Path(settings.output).expanduser(), overwrite)
    try:
        run = run_training(settings, resume="auto" if autoresume else resume, overwrite=overwrite)
    except TrainingInterrupted as stop:  # what a scheduler asked for is no failure
        if rank() == 0:
            typer.echo(f"stopped by {stop.name} after step {stop.step}, checkpoint saved; --resume goes on from there")
        return
    if rank() == 0:
        typer.echo(f"trained model: {run / 'model'}")


def _check_output(config: RunConfig, output: Path, overwrite: bool) -> None:
    """Refuse an output whose beginning would replace or remove something of the user's."""
    from ntpseg.training.config import dump_config, load_config
    from ntpseg.utils.outputs import check_folder, is_inside

    check_folder("output", output)
    read = {
        "data.path": config.data.path,
        "text.path": config.text.path,
        "vision.path": config.vision.get("path"),
        "model.weights": config.model.weights,
        "model.encoder_weights": config.model.encoder_weights,
    }
    for name, value in read.items():
        if value is not None and overwrite and is_inside(Path(value).expanduser(), output):
            raise ValueError(f"output must not hold what --overwrite would remove, got {output} with {name} {value}")
    saved = output / "config.yaml"
    if saved.is_file() and not (output / "prepared.json").is_file():
        try:
            own = saved.read_text(encoding="utf-8") == dump_config(load_config(saved))
        except ValueError:
            own = False
        if not own:
            raise ValueError(
                f"output must be a new folder, got {output} with a config.yaml that is no run's and would be replaced; "
                "choose another"
            )
