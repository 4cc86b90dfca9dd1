"""The ``ntpseg scaling`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ntpseg.cluster.scaling import Curves, ScalingPoint


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(scaling)


def scaling(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings that override the configuration, such as model.k=1 or "
            "training.gradient_accumulation_steps=4.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="Name of a ready configuration, or a YAML file.")] = "emu3-8b",
    gpu: Annotated[str, typer.Option(help="Kind of GPU: h100, a100, l4, ...")] = "h100",
    gpus: Annotated[int, typer.Option(help="The largest number of GPUs.", min=1, max=1 << 20)] = 1024,
    zero: Annotated[
        list[int] | None, typer.Option(help="ZeRO stage, 0 to 3 (0: DDP); several to compare.", min=0, max=3)
    ] = None,
    fsdp2: Annotated[bool, typer.Option("--fsdp2", help="PyTorch's FSDP2, also beside --zero.")] = False,
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Share of the GPU's peak that computation reaches; by default as ntpseg plan predicts.",
            min=0.01,
            max=1.0,
        ),
    ] = None,
    micro_batch_seconds: Annotated[
        float | None, typer.Option(help="Measured time of a micro-batch, forward and backward, in place of --mfu.")
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Share of communication that is assumed to hide behind computation.", min=0.0, max=1.0)
    ] = 0.9,
    global_batch: Annotated[int | None, typer.Option(help="Sequences of a step in strong scaling.", min=1)] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples of the data set: counts the exchange of hard tokens.", min=1)
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="File to write, .json or a picture (.png, .svg, .pdf); several at will.")
    ] = None,
) -> None:
    """Predict weak and strong scaling: step time, tokens/s, efficiency, communication, for 1 to 1,024 GPUs.

    Nothing is run. docs/cluster.md has the formulas, and what was checked of them.
    """
    from ntpseg.cluster.scaling import ScalingOptions, scaling_curves
    from ntpseg.cluster.workload import Workload
    from ntpseg.training.config import load_config

    paths = out or []
    _check_outputs(paths)
    strategies = [f"zero{stage}" if stage else "ddp" for stage in dict.fromkeys(zero or ([] if fsdp2 else [3]))]
    if fsdp2:
        strategies.append("fsdp2")
    workload = Workload.of(load_config(preset, overrides or ()))
    curves = []
    for strategy in strategies:
        options = ScalingOptions(
            gpu=gpu,
            strategy=strategy,  # type: ignore[arg-type]
            max_gpus=gpus,
            mfu=ScalingOptions.mfu if mfu is None else mfu,
            micro_batch_seconds=micro_batch_seconds,
            overlap=overlap,
            global_batch=global_batch,
            samples=samples,
        )
        curves.append(scaling_curves(workload, options))
    _print(curves, preset)
    for path in paths:
        _write(path, curves, f"{preset} on {gpu}, predicted", preset)


def _check_outputs(paths: list[Path]) -> None:
    from ntpseg.utils.outputs import check_distinct, check_file

    check_distinct("--out", paths)
    for path in paths:
        check_file("--out", path, (".json", ".png", ".svg", ".pdf"))


def _print(curves: list[Curves], preset: str) -> None:
    from rich.console import Console

    console = Console()
    first = curves[0].options
    assumed = f"{first.mfu:.0%} of the peak (assumed)"
    if first.micro_batch_seconds is not None:
        assumed = f"{first.micro_batch_seconds:g} s a micro-batch (given)"
    console.print(
        f"{preset} on {first.gpu}, all predicted: computation at {assumed}, up to {first.overlap:.0%} of the "
        "communication beside it hidden (assumed), exposed: the rest's share of a step. GB sent: by each GPU, in a "
        "step. Whether the model fits into memory is not asked here."
    )
    for each in curves:
        name = each.options.strategy
        console.print(_table(f"{name}, weak scaling: the batch of a GPU stays", each.weak))
        batch = each.options.global_batch
        console.print(_table(f"{name}, strong scaling: {batch} sequences a step", each.strong))


def _table(title: str, points: tuple[ScalingPoint, ...]) -> object:
    from rich.table import Table

    names = ("GPUs", "batch", "s/step", "tokens/s", "efficiency", "exposed", "GB sent")
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            f"{point.gpus}",
            f"{point.micro_batch} x {point.accumulation}",
            f"{point.step_seconds:.4g}",
            f"{point.tokens_per_second:.4g}",
            f"{point.efficiency:.1%}",
            f"{point.communication_share:.1%}",
            f"{point.wire_bytes / 1e9:.4g}",
        )
    return table


def _write(path: Path, curves: list[Curves], title: str, preset: str) -> None:
    if path.suffix.lower() == ".json":
        from ntpseg.utils.files import write_json

        write_json(path, {"configuration": preset, "curves": [each.to_dict() for each in curves]})
        return
    from ntpseg.cluster.scaling_plot import plot_scaling

    plot_scaling(curves, title, path)
