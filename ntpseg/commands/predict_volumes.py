"""What ``ntpseg predict`` does with volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ntpseg.generation import Segmenter
    from ntpseg.generation.volume_writing import VolumeSettings


# Folders in a folder without images that are looked into for a hint.
_SEARCHED = 20


@dataclass(frozen=True, slots=True)
class VolumeRequest:
    """What was asked for on the command line.

    Attributes:
        image: a volume, or a folder of volumes.
        volumes: the volumes that it is or holds.
        texts: the sentences.
        table: the table of sentences.
        out: a file or a folder.
        kind: the format of results in a folder; None: NIfTI.
        overlay: must be None.
        read: further files that are read.
        maps: whether probabilities are written.
    """

    image: Path
    volumes: Sequence[Path]
    texts: Sequence[str]
    table: Path | None
    out: Path
    kind: str | None
    overlay: Path | None
    read: Sequence[Path]
    maps: bool = False


def find(image: Path, series: str | None) -> list[Path]:
    """What `find_volumes` finds.

    Raises:
        ValueError: a folder with both images and volumes, or with neither.
    """
    from ntpseg.data.records import known_suffix
    from ntpseg.generation.volume_jobs import find_volumes

    volumes = find_volumes(image, series)
    if volumes and volumes != [image]:
        others = [path for path in sorted(image.iterdir()) if path not in volumes and known_suffix(path.name)]
        pictures = [path for path in others if path.is_file() and not path.name.startswith(".")]
        if pictures:
            raise ValueError(
                f"image must be a folder of images or of volumes, got {image} with both, such as {pictures[0].name} "
                f"and {volumes[0].name}; put them into two folders"
            )
    if not volumes and image.is_dir():
        entries = sorted(path for path in image.iterdir() if not path.name.startswith("."))
        if not any(known_suffix(path.name) for path in entries):
            folders = [path for path in entries if path.is_dir()][:_SEARCHED]
            deeper = next(
                (path for path in folders if find_volumes(path) or any(map(_is_picture, path.iterdir()))), None
            )
            hint = f"; its folder {deeper.name} has some: give that" if deeper is not None else ""
            raise ValueError(
                f"image must be a folder with at least one image, got {image}, a folder without images or volumes{hint}"
            )
    return volumes


def _is_picture(path: Path) -> bool:
    from ntpseg.data.records import known_suffix

    return path.is_file() and bool(known_suffix(path.name)) and not path.name.startswith(".")


def predict_volumes(
    request: VolumeRequest, settings: VolumeSettings, load: Callable[[], Segmenter], console: Console
) -> None:
    """Segment volumes and say what was written; a volume that fails ends in exit code 1 after the others.

    Raises:
        ValueError: arguments that do not fit, or the only volume fails.
    """
    from ntpseg.generation.volume_jobs import volume_jobs
    from ntpseg.generation.volume_outputs import FORMATS, volume_target, volume_targets
    from ntpseg.generation.volume_writing import write_volume_predictions
    from ntpseg.utils.checks import check_choice
    from ntpseg.utils.progress import stage_progress
    from ntpseg.volumes import AXES
    from ntpseg.volumes.windows import parse_window

    if settings.axis is not None:
        check_choice("axis", settings.axis, AXES)
    if settings.window is not None:
        parse_window(settings.window)
    if request.kind is not None:
        check_choice("--format", request.kind, FORMATS)
    if request.overlay is not None:
        raise ValueError(f"--overlay must be given for images, got {request.overlay} for a volume; leave it out")
    single = request.volumes[0] == request.image
    jobs = volume_jobs(request.volumes, request.texts, request.table)
    if single:
        targets = [volume_target(jobs[0], request.out, request.kind, request.read, maps=request.maps)]
    else:
        places = (request.image, request.out, request.kind, request.read)
        targets = volume_targets(jobs, *places, maps=request.maps)
    segmenter = load()
    with stage_progress(console) as progress:
        written = write_volume_predictions(
            segmenter, targets, settings, progress, table=None if single else request.out
        )
    if single:
        for _, reason in written.failed:
            raise ValueError(reason)
    _describe(console, None if single else request.out, written.rows)
    for name, note in written.notes:
        typer.secho(f"{name}: {note}", fg="yellow", err=True)
    for name, reason in written.failed:
        typer.secho(f"{name}: {reason}", fg="red", err=True)
    if written.failed:
        typer.secho(f"ntpseg: {len(written.failed)} of {len(targets)} volumes failed", fg="red", err=True)
        raise typer.Exit(1)


def _describe(console: Console, table: Path | None, rows: Sequence[Sequence[object]]) -> None:
    from ntpseg.generation.volume_writing import COLUMNS

    for row in (dict(zip(COLUMNS, row)) for row in rows):
        size = f"{row['ml']} ml" if row["ml"] != "" else f"{row['voxels']} voxels"
        shared = f", {row['overlap_voxels']} voxels also of another sentence" if row["overlap_voxels"] else ""
        console.print(
            f"{row['labels']}: label {row['label']} {row['text']!r}, {size}, mean confidence {row['mean_confidence']}, "
            f"{row['axis']} slices, window {row['window']}{shared}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    if table and rows:
        console.print(f"predictions.csv written to {table}", highlight=False, soft_wrap=True)
