"""The ``ntpseg predict`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ntpseg.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Method,
    Mirror,
    Passes,
    Samples,
    Seed,
    Temperature,
    Threshold,
    TopP,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ntpseg.generation import Segmenter
    from ntpseg.generation.outputs import Target
    from ntpseg.generation.writing import Written

VOLUMES = "Volumes"


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(predict)


def predict(
    model: Annotated[
        Path, typer.Option(help="A run of `ntpseg train`, or a file of `ntpseg pack`.", show_default=False)
    ],
    image: Annotated[
        Path,
        typer.Option(
            help="An image, a volume (DICOM file or folder, NIfTI, NRRD, MetaImage), or a folder of either.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Mask file, ending in .png, of a volume in .nii.gz or .dcm (DICOM-SEG), or a folder; results of an "
            "earlier prediction are replaced, other files never.",
            show_default=False,
        ),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(help="The sentence; for a folder, the one for all. Volumes take several: one label each."),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="For a folder or volumes: CSV with the columns image and text.")
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Also draw the mask over the image: .png file, or another folder.")
    ] = None,
    save_probabilities: Annotated[
        bool,
        typer.Option(
            "--save-probabilities",
            help="Also write NAME_probability.png and NAME_uncertainty.png (entropy) beside the mask, and lines of "
            "equal probability in the overlay; of a volume NAME_probability.nii.gz.",
        ),
    ] = False,
    axis: Annotated[
        str | None,
        typer.Option(help="axial, coronal or sagittal; by default as the model was trained.", rich_help_panel=VOLUMES),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="auto, header, percentile, a name such as lung, LOW..HIGH, or three joined by +; by default as the "
            "model was trained.",
            rich_help_panel=VOLUMES,
        ),
    ] = None,
    series: Annotated[
        str | None, typer.Option(help="Which series of a DICOM folder with several.", rich_help_panel=VOLUMES)
    ] = None,
    largest_component: Annotated[
        bool,
        typer.Option(
            "--largest-component", help="Keep only each mask's largest connected part.", rich_help_panel=VOLUMES
        ),
    ] = False,
    min_ml: Annotated[float, typer.Option(help="Leave out parts of fewer millilitres.", rich_help_panel=VOLUMES)] = 0.0,
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="In a folder: nii.gz (the default), nii or dcm (DICOM-SEG).", rich_help_panel=VOLUMES
        ),
    ] = None,
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
) -> None:
    """Segment an image, a volume, or a folder of them, from sentences.

    The masks of images are 0/255 PNG of the image's own size; those of volumes are labels on the volume's own grid,
    or a DICOM-SEG object.
    """
    from rich.console import Console

    from ntpseg.commands.predict_volumes import VolumeRequest, find, predict_volumes
    from ntpseg.data.tables import is_sentence
    from ntpseg.generation import PostProcessing, Segmenter
    from ntpseg.generation.volume_writing import VolumeSettings
    from ntpseg.generation.writing import write_predictions
    from ntpseg.models.bundle import bundle_files
    from ntpseg.utils.device import usable_device
    from ntpseg.utils.outputs import check_path
    from ntpseg.utils.progress import disable_loading_bars

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
    console = Console()
    disable_loading_bars()
    for option, path in (("--image", image), ("--model", model), ("--texts", texts)):
        if path is not None:
            check_path(option, path)
    for given_text in text or ():
        if not is_sentence(given_text):
            raise ValueError(f"text must be a sentence that says what to segment, got {given_text!r}")
    if not image.exists():
        raise ValueError(f"image must be a file or a folder, got {image}, which does not exist")
    read = [*bundle_files(model), *([texts] if texts else [])]

    def load() -> Segmenter:
        return Segmenter.from_pretrained(model, device=usable_device(device), **decoding)

    volumes = find(image, series)
    if volumes:
        settings = VolumeSettings(axis, window, series, PostProcessing(largest_component, min_ml))  # type: ignore[arg-type]
        request = VolumeRequest(
            image, volumes, text or [], texts, out, output_format, overlay, read, save_probabilities
        )
        predict_volumes(request, settings, load, console)
        return
    given = {
        "--axis": axis,
        "--window": window,
        "--series": series,
        "--largest-component": largest_component,
        "--min-ml": min_ml,
        "--format": output_format,
    }
    for option in (option for option, value in given.items() if value):
        raise ValueError(f"{option} must be given for a volume, got the image {image}; leave it out")
    if text is not None and len(text) > 1:
        raise ValueError(f"--text must be given once for images, got it {len(text)} times; list them in --texts")
    sentence = text[0] if text else None
    targets = _targets(image, sentence, texts, out, overlay, read, maps=save_probabilities)
    segmenter = load()
    if image.is_dir():
        _write_folder(console, segmenter, targets, out)
        return
    written = write_predictions(segmenter, targets)
    for _, reason in written.failed:
        raise ValueError(reason)
    _describe(console, targets[0].mask, written)


def _targets(
    image: Path,
    sentence: str | None,
    texts: Path | None,
    out: Path,
    overlay: Path | None,
    read: list[Path],
    *,
    maps: bool,
) -> list[Target]:
    """What is written for an image, or for each of a folder, checked before anything is loaded.

    Args:
        image, sentence, texts, out, overlay: the options.
        read: files that must not be overwritten.
        maps: probabilities and uncertainty are written too.

    Raises:
        ValueError: there is no sentence, a table is given for one image, or a file cannot be written.
    """
    from ntpseg.generation.folder import Job, folder_jobs
    from ntpseg.generation.outputs import file_target, folder_targets

    if image.is_dir():
        return folder_targets(folder_jobs(image, sentence, texts), image, out, overlay, read, maps=maps)
    if texts is not None:
        raise ValueError(f"--texts must be given for a folder of images, got {texts} for the image {image}")
    if sentence is None:
        raise ValueError("text must be the sentence that says what to segment, got none")
    return [file_target(Job(image, sentence, image.stem), out, overlay, read, maps=maps)]


def _write_folder(console: Console, segmenter: Segmenter, targets: list[Target], out: Path) -> None:
    """Write the masks of a folder and say how many; ends with exit status 1 where an image could not be read."""
    from ntpseg.generation.writing import write_predictions
    from ntpseg.utils.progress import counter, stage_progress

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
