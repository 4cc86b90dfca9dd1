"""Segmenting many images so that one that fails costs the others nothing, each written as soon as it is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ntpseg.data import read_windowed, resize_probability, write_png
from ntpseg.generation.outputs import Target
from ntpseg.generation.overlay import draw, draw_levels
from ntpseg.generation.own_outputs import MARK, TABLE
from ntpseg.generation.uncertainty import pixel_entropy
from ntpseg.utils.files import printable, write_csv
from ntpseg.utils.outputs import cure

if TYPE_CHECKING:
    from ntpseg.data.images import Window
    from ntpseg.generation.options import Prediction
    from ntpseg.generation.segmenter import Segmenter

COLUMNS = ("image", "text", "mask", "area_fraction", "mean_confidence", "window", "mean_entropy", "sample_dice")
# Images held at a time; a multiple of the batch, so that batches are full.
CHUNK = 256


@dataclass
class Written:
    """What became of the images.

    Attributes:
        rows: of ``predictions.csv``, one for each mask, see `COLUMNS`.
        failed: file name and reason of each image that could not be read.
        last: the prediction that was written last.
        window: of the image of `last`, see `read_windowed`.
    """

    rows: list[list[str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    last: Prediction | None = None
    window: Window | None = None


def write_predictions(
    segmenter: Segmenter,
    targets: Sequence[Target],
    progress: Callable[[int], None] | None = None,
    *,
    table: Path | None = None,
) -> Written:
    """Segment images and write their masks, maps and overlays; each file appears whole, in place of an earlier one.

    Args:
        segmenter: the model.
        targets: the images and their files.
        progress: called with the number of images just finished.
        table: folder in which ``predictions.csv`` lists the masks that were written, also where this ends early.

    Raises:
        ValueError: a file cannot be written (a full disk, for instance); those before it stay.
    """
    written = Written()
    size = segmenter.options.batch_size
    size *= max(1, CHUNK // size)
    try:
        for first in range(0, len(targets), size):
            _write_chunk(segmenter, targets[first : first + size], progress, written)
    except OSError as error:
        raise ValueError(
            f"masks must be written, got {error.filename or targets[len(written.rows)].mask} ({error.strerror}) after "
            f"{len(written.rows)} of {len(targets)}; {cure(error)}"
        ) from error
    finally:
        if table is not None and written.rows:
            with contextlib.suppress(OSError):
                write_csv(table / TABLE, COLUMNS, written.rows)
    return written


def _write_chunk(
    segmenter: Segmenter, targets: Sequence[Target], progress: Callable[[int], None] | None, written: Written
) -> None:
    readable: list[tuple[Target, np.ndarray, Window | None]] = []
    for target in targets:
        try:
            readable.append((target, *read_windowed(target.job.image)))
        except Exception as error:  # decoders of broken files raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            written.failed.append((printable(target.job.image.name), reason))
            if progress is not None:
                progress(1)
    if not readable:
        return
    predictions = segmenter.segment_all([p for _, p, _ in readable], [t.job.text for t, _, _ in readable], progress)
    for (target, pixels, window), prediction in zip(readable, predictions, strict=True):
        write_png(target.mask, prediction.mask, MARK)
        drawn = None if target.overlay is None else draw(pixels, prediction.mask)
        if target.has_maps:
            soft = resize_probability(prediction.probability, *prediction.mask.shape)
            write_png(target.probability, _eight_bits(soft), MARK)
            write_png(target.uncertainty, _eight_bits(pixel_entropy(soft)), MARK)
            drawn = None if drawn is None else draw_levels(drawn, soft)
        if target.overlay is not None and drawn is not None:
            write_png(target.overlay, drawn, MARK)
        area, confidence = f"{prediction.mask.mean():.6f}", f"{prediction.confidence.mean():.4f}"
        names = printable(target.job.image.name), target.job.text, printable(target.mask.name)
        agreement = "" if prediction.sample_dice is None else f"{prediction.sample_dice:.4f}"
        spread = f"{prediction.entropy.mean():.4f}", agreement
        written.rows.append([*names, area, confidence, "" if window is None else str(window), *spread])
        written.last, written.window = prediction, window


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8; 255 is 1."""
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
