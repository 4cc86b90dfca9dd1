"""The ``ntpseg plan`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ntpseg.cluster.planning.plan import Plan


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(plan)


def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that override the configuration's, such as data.size=256.", metavar="KEY=VALUE"),
    ] = None,
    preset: Annotated[str, typer.Option(help="Name of a ready configuration, a YAML file, or a run.")] = "base",
    gpus: Annotated[int, typer.Option(help="GPUs in all.", min=1)] = 1,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: h100, a100, l4, ...")] = "h100",
    zero: Annotated[str, typer.Option(help="auto, none, 1, 2, 3 or fsdp2.")] = "auto",
    data: Annotated[Path | None, typer.Option(help="Data set, for its size and the lengths of its sentences.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Sequences of a micro-batch; what is quickest by default.", min=1)
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Sequences of a step on all GPUs; by default the configuration's on each GPU.", min=1),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Of activations; where it is needed by default."),
    ] = None,
    offload: Annotated[
        bool | None,
        typer.Option("--offload/--no-offload", help="Of the optimizer; where nothing fits without by default."),
    ] = None,
    precision: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    measured: Annotated[
        Path | None, typer.Option(help="A run on such GPUs: its log's mfu replaces the predicted one.")
    ] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(help="Of one GPU; for the cost.", min=0.0)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file as well.")] = None,
) -> None:
    """Plan a run before it is paid for: memory by part, ZeRO stage, micro-batch, tokens/s, hours and cost.

    Exit code 0: it fits; 1: it does not, and the last lines say what would.
    """
    from ntpseg.cluster.machines import gpu as gpu_named
    from ntpseg.cluster.planning.plan import make_plan
    from ntpseg.cluster.planning.search import PlanOptions
    from ntpseg.training import load_config
    from ntpseg.utils.files import write_json
    from ntpseg.utils.outputs import check_file, check_not_inputs

    options = PlanOptions(
        gpus=gpus,
        zero=zero,
        samples=micro_batch,
        checkpointing=checkpointing,
        offload=offload,
        precision=precision,
        sequences_per_step=batch,
        price=price_per_gpu_hour,
    )
    if json_file is not None:
        check_file("--json", json_file, (".json",))
        check_not_inputs("--json", [json_file], [Path(preset), *([measured] if measured else [])])
    made = make_plan(load_config(preset, overrides or ()), gpu_named(gpu), options, data=data, measured=measured)
    _print(made, preset)
    if json_file is not None:
        write_json(json_file, made.to_dict())
    if not made.fits:
        raise typer.Exit(1)


def _print(plan: Plan, preset: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from ntpseg.cluster.planning.search import describe

    console, chosen, memory = Console(soft_wrap=True), plan.chosen, plan.chosen.memory
    gpus = plan.options.gpus
    console.print(
        f"{preset}: {plan.parameters / 1e9:.3g} billion parameters, {gpus} x {plan.gpu.name}, "
        f"sequences of {plan.mean_tokens:.0f} tokens ({plan.tokens} at most)"
    )
    table = Table("part", "GiB", title="memory per GPU, predicted")
    for name, size in memory.parts.items():
        if size >= 2**20:
            table.add_row(name, f"{size / 2**30:.2f}")
    table.add_section()
    table.add_row(f"in all, at the {memory.phase.replace('_', ' ')}", f"{memory.total / 2**30:.2f}")
    table.add_row("usable", f"{plan.usable / 2**30:.2f}")
    console.print(table)
    lengths = (f"{size / 2**20:.0f} MiB at {tokens} tokens" for tokens, size in plan.activations_by_length.items())
    console.print(f"activations of one layer and micro-batch: {', '.join(lengths)}")
    if memory.host:
        node = min(gpus, plan.gpu.gpus_per_node)
        console.print(f"host memory: {node * memory.host / 2**30:.0f} GiB of a machine with {node} GPUs")
    if not plan.fits:
        console.print(f"[red]does not fit[/red]: {describe(chosen, plan.gpu)}")
        for text in plan.remedies or ("nothing of one step: use a smaller preset, data.size or model.k",):
            console.print(f"  what would: {text}")
        return
    console.print(f"[green]fits[/green]: {describe(chosen, plan.gpu)}")
    _print_time(plan, console)


def _print_time(plan: Plan, console: Any) -> None:
    from rich.table import Table

    chosen, compute = plan.chosen, plan.chosen.compute
    source = f"; mfu measured in {plan.measured['mfu']}" if plan.measured else ""
    table = Table("figure", "value", title=f"time and cost, predicted{source}")
    rows = {
        "sequences per step": f"{plan.sequences} (micro-batch {chosen.batch.samples} x accumulation "
        f"{chosen.batch.accumulation} x {plan.options.gpus} GPUs)",
        "step": f"{chosen.seconds:.3g} s: model {compute.model:.3g}, recomputation {compute.recomputation:.3g}, "
        f"optimizer {compute.optimizer:.3g}, collectives {chosen.collectives.exposed:.3g} "
        f"({chosen.collectives.total:.3g} with those beside the model)",
        "tokens per second": f"{plan.tokens_per_second:,.0f}",
        "model FLOPs of the data sheet's rate": f"{plan.utilisation:.1%}",
    }
    if plan.hours_per_epoch is not None and plan.hours is not None:
        rows["epoch"] = f"{plan.steps_per_epoch} steps, {plan.hours_per_epoch:.3g} hours"
        rows["all epochs"] = f"{plan.hours:.3g} hours, {plan.hours * plan.options.gpus:.3g} GPU-hours"
    else:
        rows["epoch"] = "give --data for its hours"
    if plan.options.price is not None:
        hour = plan.options.price * plan.options.gpus
        rows["cost per hour"] = f"{hour:.2f}"
        if plan.cost_per_epoch is not None:
            rows["cost of an epoch, of all"] = f"{plan.cost_per_epoch:.2f}, {plan.cost:.2f}"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print("settings: " + " ".join(f"'{a}'" if " " in a else a for a in plan.arguments))
