"""Segmenting volumes so that one that fails costs the others nothing, each written as soon as it is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntpseg.generation.own_outputs import TABLE
from ntpseg.generation.post_processing import PostProcessing
from ntpseg.generation.volume_outputs import VolumeTarget
from ntpseg.utils.files import printable, write_csv, write_json
from ntpseg.utils.outputs import cure
from ntpseg.utils.progress import StageCallback, counter
from ntpseg.volumes import Axis, Volume

if TYPE_CHECKING:
    from ntpseg.generation.segmenter import Segmenter
    from ntpseg.generation.volume import VolumePrediction

COLUMNS = ("volume", "text", "labels", "label", "voxels", "ml", "mean_confidence", "axis", "window", "overlap_voxels")


@dataclass(frozen=True, slots=True)
class VolumeSettings:
    """How volumes are read and segmented, see `Segmenter.segment_volume`."""

    axis: Axis | None = None
    window: str | None = None
    series: str | None = None
    post_processing: PostProcessing = field(default_factory=PostProcessing)


@dataclass
class WrittenVolumes:
    """What became of the volumes.

    Attributes:
        rows: of ``predictions.csv``, one for each sentence, see `COLUMNS`.
        failed: name and reason of each volume that could not be segmented.
        notes: name and remark of what the reader found odd, see `ntpseg.volumes.Header.notes`.
    """

    rows: list[list[Any]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def write_volume_predictions(
    segmenter: Segmenter,
    targets: Sequence[VolumeTarget],
    settings: VolumeSettings,
    progress: StageCallback | None = None,
    *,
    table: Path | None = None,
) -> WrittenVolumes:
    """Segment volumes and write their labels; each file appears whole, in place of an earlier one.

    Args:
        segmenter: the model.
        targets: the volumes and their files.
        settings: how they are read and segmented.
        progress: called with each volume's name and the masks of its slices that are done.
        table: folder in which ``predictions.csv`` lists the labels that were written, also where this ends early.

    Raises:
        ValueError: a file cannot be written (a full disk, for instance), or the model remembers no axis or window and
            none is given.
    """
    from ntpseg.generation.volume import chosen_input

    chosen_input(segmenter.bundle.volume, settings.axis, settings.window)
    written = WrittenVolumes()
    try:
        for target in targets:
            _write(segmenter, target, settings, progress, written)
    finally:
        if table is not None and written.rows:
            with contextlib.suppress(OSError):
                write_csv(table / TABLE, COLUMNS, written.rows)
    return written


def _write(
    segmenter: Segmenter,
    target: VolumeTarget,
    settings: VolumeSettings,
    progress: StageCallback | None,
    written: WrittenVolumes,
) -> None:
    from ntpseg.generation.volume import chosen_input, segment_volume
    from ntpseg.volumes.reading import read_volume

    job = target.job
    # The current folder has no name of its own.
    name = printable(job.volume.name or job.name)
    axis, window = chosen_input(segmenter.bundle.volume, settings.axis, settings.window)
    try:
        volume = read_volume(job.volume, series=settings.series)
        sources = _sources(target, volume, settings.series)
        total = volume.count(axis) * len(job.texts)
        predictions = segment_volume(
            segmenter,
            volume,
            job.texts,
            axis=axis,
            window=window,
            post_processing=settings.post_processing,
            probability=target.has_maps,
            progress=None if progress is None else counter(progress, printable(job.name), total),
        )
    except Exception as error:  # readers of broken files raise anything
        written.failed.append((name, _reason(error)))
        return
    written.notes += [(name, note) for note in (*volume.header.notes, *_unsuited(predictions[0].window, volume))]
    source = job.volume if volume.header.source == "nifti" else None
    # Voxels are no longer needed, and may be the larger part of what is held.
    del volume
    try:
        overlap = _write_files(target, predictions, source, sources)
    except OSError as error:
        raise ValueError(
            f"labels must be written, got {error.filename or target.labels} ({error.strerror}); {cure(error)}"
        ) from error
    except ValueError as error:  # what only this volume's headers are to blame for
        written.failed.append((name, _reason(error)))
        return
    for number, prediction in enumerate(predictions, start=1):
        written.rows.append(
            [
                name,
                prediction.text,
                printable(target.labels.name),
                number,
                int(prediction.mask.sum()),
                "" if prediction.ml is None else f"{prediction.ml:.3f}",
                f"{prediction.confidence.mean():.4f}",
                prediction.axis,
                prediction.window,
                overlap[number - 1],
            ]
        )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unsuited(window: str, volume: Volume) -> list[str]:
    """A remark on a window in Hounsfield units for what is no CT."""
    from ntpseg.volumes.windows import WINDOWS

    named = [part for part in window.split("+") if part in WINDOWS]
    if not named or volume.header.modality in ("", "CT"):
        return []
    return [f"window {named[0]} is in Hounsfield units, which {volume.header.modality} does not have"]


def _sources(target: VolumeTarget, volume: Volume, series: str | None) -> Any:
    """The headers that a DICOM-SEG object needs, before anything is computed; None for other files."""
    if not target.is_dicom:
        return None
    if volume.header.source != "dicom":
        raise ValueError(
            f"a DICOM-SEG object must be of a DICOM series, got {volume.header.source}; end --out in .nii.gz"
        )
    from ntpseg.volumes.dicom_seg import check_sources
    from ntpseg.volumes.dicom_sources import source_headers

    headers = source_headers(target.job.volume, series)
    check_sources(headers, volume.stored)
    return headers


def _write_files(
    target: VolumeTarget, predictions: Sequence[VolumePrediction], source: Path | None, sources: Any
) -> list[int]:
    """Write the files of one volume; of each sentence the voxels that it shares with another."""
    from ntpseg.volumes.label_nifti import write_label_nifti

    texts, stored = target.job.texts, predictions[0].stored
    labels, overlap = label_volume([prediction.mask for prediction in predictions])
    if not target.is_dicom:
        # First: it says whose the others are, also where writing them ends early.
        write_json(target.names, _names(target, predictions, overlap))
    for number, prediction in enumerate(predictions, start=1):
        if prediction.probability is not None:
            # NIfTI has no half precision.
            values = prediction.to_stored(prediction.probability).astype(np.float32)
            write_label_nifti(target.probability(number), values, stored, source)
    if target.is_dicom:
        from ntpseg.volumes.dicom_seg import write_dicom_seg

        write_dicom_seg(target.labels, [prediction.to_stored() for prediction in predictions], texts, stored, sources)
        return overlap
    if any(overlap):
        for number, prediction in enumerate(predictions, start=1):
            write_label_nifti(target.part(number), prediction.to_stored().astype(np.uint8), stored, source)
    write_label_nifti(target.labels, predictions[0].to_stored(labels), stored, source)
    return overlap


def _names(target: VolumeTarget, predictions: Sequence[VolumePrediction], overlap: list[int]) -> dict[str, Any]:
    """What the file beside the labels says of them."""
    entries = []
    for number, prediction in enumerate(predictions, start=1):
        entry = {"label": number, "text": prediction.text, "voxels": int(prediction.mask.sum()), "ml": prediction.ml}
        if any(overlap):
            entry["overlap_voxels"], entry["file"] = overlap[number - 1], printable(target.part(number).name)
        entries.append(entry)
    # nnU-Net's dataset.json calls the labels so; label 0 is the background.
    names = {text: number for number, text in enumerate(target.job.texts, start=1)}
    names = {"background": 0, **names} if "background" not in names else names
    return {"labels": names, "sentences": entries}


def label_volume(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """One array of labels from 1 on, uint8 or uint16; where masks overlap the later one counts.

    Args:
        masks: bool ``[D, H, W]`` each.

    Returns:
        The labels, and of each mask the voxels that it shares with another.
    """
    labels = np.zeros(masks[0].shape, np.uint8 if len(masks) < 256 else np.uint16)
    shared = np.zeros(masks[0].shape, bool)
    for number, mask in enumerate(masks, start=1):
        shared |= mask & (labels > 0)
        labels[mask] = number
    return labels, [int((mask & shared).sum()) for mask in masks]
