"""The ``ntpseg predict`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntpseg.commands.options import BatchSize, Device, Dtype, Method, Mirror, Passes, Samples, Threshold

if TYPE_CHECKING:
    from rich.console import Console

    from ntpseg.generation.writing import Written


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(predict)


def predict(
    model: Annotated[
        Path, typer.Option(help="A run of `ntpseg train`, or a file of `ntpseg pack`.", show_default=False)
    ],
    image: Annotated[Path, typer.Option(help="An image, or a folder of images.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(help="Mask file, ending in .png, or a folder; what is there is replaced.", show_default=False),
    ],
    text: Annotated[str | None, typer.Option(help="The sentence; for a folder, the one for all.")] = None,
    texts: Annotated[Path | None, typer.Option(help="For a folder: CSV with the columns image and text.")] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Also draw the mask over the image: .png file, or another folder.")
    ] = None,
    batch_size: BatchSize = 64,
    method: Method = None,
    passes: Passes = None,
    samples: Samples = None,
    threshold: Threshold = None,
    mirror: Mirror = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Segment an image, or every image of a folder, from a sentence; masks are 0/255 PNG of the image's own size."""
    from rich.console import Console

    from ntpseg.data.tables import is_sentence
    from ntpseg.generation import Segmenter
    from ntpseg.generation.folder import Job, folder_jobs
    from ntpseg.generation.outputs import file_target, folder_targets
    from ntpseg.generation.writing import write_predictions
    from ntpseg.models.bundle import bundle_files
    from ntpseg.utils.device import usable_device
    from ntpseg.utils.outputs import check_path
    from ntpseg.utils.progress import counter, disable_loading_bars, stage_progress

    decoding: dict[str, Any] = {
        "batch_size": batch_size,
        "method": method,
        "passes": passes,
        "samples": samples,
        "threshold": threshold,
        "mirror": mirror,
        "dtype": dtype,
    }
    console = Console()
    disable_loading_bars()
    for option, path in (("--image", image), ("--model", model), ("--texts", texts)):
        if path is not None:
            check_path(option, path)
    if text is not None and not is_sentence(text):
        raise ValueError(f"text must be a sentence that says what to segment, got {text!r}")
    if not image.exists():
        raise ValueError(f"image must be a file or a folder, got {image}, which does not exist")
    read = [*bundle_files(model), *([texts] if texts else [])]
    if image.is_dir():
        targets = folder_targets(folder_jobs(image, text, texts), image, out, overlay, read)
    elif texts is not None:
        raise ValueError(f"--texts must be given for a folder of images, got {texts} for the image {image}")
    elif text is None:
        raise ValueError("text must be the sentence that says what to segment, got none")
    else:
        targets = [file_target(Job(image, text, image.stem), out, overlay, read)]
    segmenter = Segmenter.from_pretrained(model, device=usable_device(device), **decoding)
    if not image.is_dir():
        written = write_predictions(segmenter, targets)
        for _, reason in written.failed:
            raise ValueError(reason)
        _describe(console, targets[0].mask, written)
        return
    with stage_progress(console) as progress:
        written = write_predictions(segmenter, targets, counter(progress, "decoding", len(targets)), table=out)
    if written.rows:
        console.print(
            f"{len(written.rows)} mask{'s' * (len(written.rows) > 1)} and predictions.csv written to {out}",
            highlight=False,
            soft_wrap=True,
        )
    for name, reason in written.failed:
        typer.secho(f"{name}: {reason}", fg="red", err=True)
    if written.failed:
        typer.secho(f"ntpseg: {len(written.failed)} of {len(targets)} images could not be read", fg="red", err=True)
        raise typer.Exit(1)


def _describe(console: Console, mask: Path, written: Written) -> None:
    prediction = written.last
    assert prediction is not None
    height, width = prediction.mask.shape
    area, confidence = 100 * prediction.mask.mean(), prediction.confidence.mean()
    console.print(
        f"{mask}: {width} x {height} pixels, {area:.1f} % foreground, mean confidence {confidence:.2f}"
        + ("" if written.window is None else f", grey levels {written.window} of the image stretched to 0..255"),
        highlight=False,
        soft_wrap=True,
    )
