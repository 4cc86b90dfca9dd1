"""The ``ntpseg eval`` command (also called ``evaluate``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntpseg.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Layout,
    MaskValue,
    Method,
    Mirror,
    Passes,
    Samples,
    Seed,
    SkipBad,
    Temperature,
    Threshold,
    TopP,
)

if TYPE_CHECKING:
    from ntpseg.data import Record


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("eval")(evaluate)
    app.command("evaluate", hidden=True)(evaluate)


def evaluate(
    model: Annotated[
        Path, typer.Option(help="A run of `ntpseg train`, or a file of `ntpseg pack`.", show_default=False)
    ],
    data: Annotated[Path | None, typer.Option(help="Data set; by default the run's own.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test; by default test, or val if there is none.")
    ] = None,
    layout: Layout = "auto",
    mask_value: MaskValue = "",
    out: Annotated[Path | None, typer.Option(help="Result folder; RUN/eval/SPLIT by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate this many cases, spread evenly.", min=1)] = None,
    text_check: Annotated[int, typer.Option(help="Cases decoded again with an empty and a wrong text.", min=0)] = 256,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Of the val split of a run: fit the temperature of its probabilities and save it with the model.",
        ),
    ] = False,
    batch_size: BatchSize = 64,
    method: Method = None,
    passes: Passes = None,
    samples: Samples = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    threshold: Threshold = None,
    mirror: Mirror = None,
    dtype: Dtype = "auto",
    device: Device = None,
    skip_bad: SkipBad = False,
) -> None:
    """Decode a split, score it, and write summary.json, cases.csv and the masks."""
    from rich.console import Console

    from ntpseg.data import MaskOptions, problem_table
    from ntpseg.data.loading import list_dataset
    from ntpseg.data.problems import DataProblems
    from ntpseg.data.records import SPLITS
    from ntpseg.evaluation import EvaluationOptions
    from ntpseg.evaluation import evaluate as run
    from ntpseg.evaluation.calibration_file import FITTED, check_calibration, save_temperature
    from ntpseg.evaluation.result import check_result_folder
    from ntpseg.evaluation.run_directory import data_of, masks_of, run_directory
    from ntpseg.evaluation.tables import summary_table
    from ntpseg.evaluation.truth import truth_records
    from ntpseg.generation import Segmenter
    from ntpseg.models.bundle import bundle_files
    from ntpseg.utils.device import usable_device
    from ntpseg.utils.outputs import check_path
    from ntpseg.utils.progress import disable_loading_bars, stage_progress

    decoding: dict[str, Any] = {
        "batch_size": batch_size,
        "method": method,
        "passes": passes,
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "threshold": threshold,
        "mirror": mirror,
        "dtype": dtype,
    }
    checks = EvaluationOptions(text_check=text_check, calibrate=calibrate)
    for option, path in (("--model", model), ("--data", data), ("--out", out)):
        if path is not None:
            check_path(option, path)
    root = run_directory(model)
    if root.is_file() and out is None:
        raise ValueError(f"--out must name the result folder for a model file, got none for {model}")
    if calibrate:
        check_calibration(root, split, {name: decoding[name] for name in FITTED})
    masks = MaskOptions(mask_value=mask_value)
    if data is None:
        data, layout = data_of(root)
        masks = masks if mask_value else masks_of(root)
    listing = list_dataset(data, layout, masks)
    labelled = [r for r in listing.records if r.mask is not None]
    given, split = split, split or default_split(labelled)
    records = [r for r in labelled if r.split == split]
    if not records:
        known = ", ".join(name for name in SPLITS if any(r.split == name for r in labelled)) or "no mask in any"
        if given is None:
            raise ValueError(
                f"--split must be given for data without a test or val split, got none; {data} has {known}"
            )
        raise ValueError(f"split must have a case with a mask in {data}, got {split!r}; it has {known}")
    records, problems = truth_records(listing, records)
    if problems and not skip_bad:
        raise DataProblems(data, problems)
    if problems:
        Console(stderr=True).print(problem_table(problems, title="Left out", limit=50))
    if not records:
        raise ValueError(f"split must have a usable case in {data}, got none in {split!r}")
    if limit is not None and limit < len(records):
        records = [records[i * len(records) // limit] for i in range(limit)]
    target = out or root / "eval" / split
    check_result_folder(target, records, [*bundle_files(model), data])
    disable_loading_bars()
    segmenter = Segmenter.from_pretrained(model, device=usable_device(device), **decoding)
    console = Console()
    with stage_progress(console) as progress:
        result = run(segmenter, records, checks, progress=progress)
    result.summary = {"data": str(data), "split": split, **result.summary}
    result.write(target)
    if calibrate:
        save_temperature(root, segmenter.bundle.decoding, result.summary)
    console.print(summary_table(result.summary, f"{split} split of {data}"))
    console.print(f"written to {target}", highlight=False, soft_wrap=True)


def default_split(records: Sequence[Record]) -> str:
    """The split to evaluate where none is named: test, or val in a data set without it."""
    return "test" if any(record.split == "test" for record in records) else "val"
