"""The ``ntpseg predict`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntpseg.commands.options import BatchSize, Device, Dtype, Method, Mirror, Passes, Samples, Threshold

if TYPE_CHECKING:
    from ntpseg.generation import Prediction
    from ntpseg.generation.folder import Job


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(predict)


def predict(
    model: Annotated[
        Path, typer.Option(help="A run of `ntpseg train`, or a file of `ntpseg pack`.", show_default=False)
    ],
    image: Annotated[Path, typer.Option(help="An image, or a folder of images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Mask file (PNG), or a folder for a folder.", show_default=False)],
    text: Annotated[str | None, typer.Option(help="The sentence; for a folder, the one for all.")] = None,
    texts: Annotated[Path | None, typer.Option(help="For a folder: CSV with the columns image and text.")] = None,
    overlay: Annotated[Path | None, typer.Option(help="Also draw the mask over the image: file, or folder.")] = None,
    batch_size: BatchSize = 64,
    method: Method = None,
    passes: Passes = None,
    samples: Samples = None,
    threshold: Threshold = None,
    mirror: Mirror = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Segment an image, or every image of a folder, from a sentence; masks are 0/255 PNG of the image's own size."""
    from rich.console import Console

    from ntpseg.generation import Segmenter
    from ntpseg.generation.folder import Job, folder_jobs
    from ntpseg.utils.files import write_csv
    from ntpseg.utils.progress import counter, disable_loading_bars, stage_progress

    decoding: dict[str, Any] = {
        "batch_size": batch_size,
        "method": method,
        "passes": passes,
        "samples": samples,
        "threshold": threshold,
        "mirror": mirror or None,
        "dtype": dtype,
    }
    console = Console()
    disable_loading_bars()
    if not image.exists():
        raise ValueError(f"image must be a file or a folder, got {image}, which does not exist")
    if image.is_dir():
        jobs = folder_jobs(image, text, texts)
        segmenter = Segmenter.from_pretrained(model, device=device, **decoding)
        rows = []
        with stage_progress(console) as progress:
            advance = counter(progress, "decoding", len(jobs))
            predictions = segmenter.segment_all([job.image for job in jobs], [job.text for job in jobs], advance)
            for job, prediction in zip(jobs, predictions, strict=True):
                mask = out / f"{job.name}.png"
                _write(job, prediction, mask, overlay and overlay / f"{job.name}.png")
                area, confidence = prediction.mask.mean(), prediction.confidence.mean()
                rows.append([job.image.name, job.text, mask.name, f"{area:.6f}", f"{confidence:.4f}"])
        write_csv(out / "predictions.csv", ["image", "text", "mask", "area_fraction", "mean_confidence"], rows)
        console.print(f"{len(jobs)} masks and predictions.csv written to {out}", highlight=False, soft_wrap=True)
        return
    if text is None:
        raise ValueError("text must be the sentence that says what to segment, got none")
    segmenter = Segmenter.from_pretrained(model, device=device, **decoding)
    prediction = segmenter.segment(image, text)
    _write(Job(image, text, image.stem), prediction, out, overlay)
    height, width = prediction.mask.shape
    area, confidence = 100 * prediction.mask.mean(), prediction.confidence.mean()
    console.print(
        f"{out}: {width} x {height} pixels, {area:.1f} % foreground, mean confidence {confidence:.2f}",
        highlight=False,
        soft_wrap=True,
    )


def _write(job: Job, prediction: Prediction, mask: Path, overlay: Path | None) -> None:
    from ntpseg.data import read_image, write_png
    from ntpseg.generation.overlay import draw

    write_png(mask, prediction.mask)
    if overlay is not None:
        write_png(overlay, draw(read_image(job.image), prediction.mask))
