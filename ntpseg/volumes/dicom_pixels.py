"""The voxels of one DICOM file in the modality's unit, and what is kept of its header."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.volumes.extras import require
from ntpseg.volumes.volume import Header

# Further than this, a pixel spacing in millimetres is a mistake of whoever wrote the header.
_SPACING_MM = (1e-4, 100.0)


def reading(path: Path) -> Any:
    """The dataset of a file, pixels not decoded.

    Raises:
        ValueError: it is no DICOM file, or a damaged one; the message names it.
    """
    pydicom = require("pydicom", "medical", "reading DICOM")
    try:
        with warnings.catch_warnings():
            # Values that break the standard's rules on their form; what matters is checked where it is used.
            warnings.simplefilter("ignore")
            return pydicom.dcmread(path, force=True)
    except Exception as error:  # pydicom raises anything on a damaged header
        raise _unreadable(path, error) from error


def read_frames(path: Path, dataset: Any) -> np.ndarray:
    """Decode the pixels of a file.

    Rescale slope and intercept, or the modality lookup table, are applied; palettes and YBR become
    RGB; padding takes the value of the image itself that is displayed darkest.

    Returns:
        ``[N, H, W]``, int16 or another integer dtype where every value is one, else float32; or uint8 ``[N, H, W, 3]``.

    Raises:
        ValueError: the transfer syntax has no decoder here, or the data are damaged; the message names the file.
    """
    require("pydicom", "medical", "reading DICOM")
    from pydicom.pixels import apply_color_lut, pixel_array

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not getattr(dataset.file_meta, "TransferSyntaxUID", None):
                dataset.file_meta.TransferSyntaxUID = _guessed_syntax(dataset)
            pixels = pixel_array(dataset)
            if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
                pixels = _eight_bits(apply_color_lut(pixels, dataset))
    except Exception as error:  # decoders raise anything
        raise _unreadable(path, error) from error
    coloured = (
        int(dataset.get("SamplesPerPixel", 1)) == 3 or dataset.get("PhotometricInterpretation") == "PALETTE COLOR"
    )
    frames = pixels if pixels.ndim == 3 + coloured else pixels[None]
    if coloured:
        return _eight_bits(frames)
    return _in_units(path, frames, dataset)


def kept_header(dataset: Any, notes: tuple[str, ...], *, placed: bool) -> tuple[Header, tuple[float, float, float]]:
    """What is kept of a header, and the spacing of slices, rows and columns in millimetres (1 where unknown).

    Args:
        dataset: of the first slice.
        notes: what is odd about the series.
        placed: whether the places of its slices are known, or it has only one.
    """
    rows, columns = _pixel_spacing(dataset)
    known = placed and rows is not None
    thickness = _millimetres(_shared(dataset, "SpacingBetweenSlices")) or _millimetres(
        _shared(dataset, "SliceThickness")
    )
    if rows is None:
        notes = (*notes, "the file does not state its pixels' size in millimetres")
    header = Header(
        source="dicom",
        modality=str(dataset.get("Modality", "")),
        body_part=str(dataset.get("BodyPartExamined", "") or "").lower(),
        windows=_windows(dataset),
        spacing_known=known,
        inverted=dataset.get("PhotometricInterpretation") == "MONOCHROME1",
        burnt_in={"YES": True, "NO": False}.get(str(dataset.get("BurnedInAnnotation", ""))),
        notes=notes,
    )
    return header, (thickness or 1.0, rows or 1.0, columns or 1.0)


def _in_units(path: Path, frames: np.ndarray, dataset: Any) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut

    padding = _padding(frames, dataset)
    inverted = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
    if dataset.get("ModalityLUTSequence"):
        values = apply_modality_lut(frames, dataset)
    else:
        values = _rescaled(path, frames, dataset)
    if padding is not None and not padding.all():
        values = np.where(padding, values[~padding].max() if inverted else values[~padding].min(), values)
    return values


def _rescaled(path: Path, frames: np.ndarray, dataset: Any) -> np.ndarray:
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    pairs = []
    for group in groups[: len(frames)] or [None]:
        found = None
        for place in (group, shared):
            items = place.get("PixelValueTransformationSequence") if place is not None else None
            found = found or (items[0] if items else None)
        source = found if found is not None else dataset
        slope, intercept = source.get("RescaleSlope"), source.get("RescaleIntercept")
        pairs.append(
            (1.0 if slope in (None, "") else float(slope), 0.0 if intercept in (None, "") else float(intercept))
        )
    if not np.isfinite(pairs).all() or any(slope == 0 for slope, _ in pairs):
        raise ValueError(f"{path} must have a finite rescale slope that is not 0, got {pairs[0]}")
    slope, intercept = (np.array(part).reshape(-1, 1, 1) for part in zip(*pairs))
    whole = frames.dtype.kind in "iu" and (slope % 1 == 0).all() and (intercept % 1 == 0).all()
    if not whole:
        return (frames * slope + intercept).astype(np.float32)
    values = frames.astype(np.int64) * slope.astype(np.int64) + intercept.astype(np.int64)
    # The smallest dtype of all that every slice of one scanner fits into, so that slices agree.
    low, high = int(values.min()), int(values.max())
    return values.astype(np.int16 if low >= -(2**15) and high < 2**15 else np.int32)


def _padding(frames: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Stored pixels that are outside of the scanner's field; None where the file has none."""
    value = dataset.get("PixelPaddingValue")
    if value is None or isinstance(value, bytes):
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None or isinstance(limit, bytes) else limit)))
    inside = (frames >= low) & (frames <= high)
    return inside if inside.any() else None


def _windows(dataset: Any) -> tuple[tuple[float, float], ...]:
    """``(low, high)`` of each window of the header."""
    centers, widths = (_numbers(_shared(dataset, tag)) for tag in ("WindowCenter", "WindowWidth"))
    windows = []
    for center, width in zip(centers, widths):
        # PS3.3 C.11.2.1.2: LINEAR reaches from c - 0.5 - (w - 1)/2 to c - 0.5 + (w - 1)/2.
        linear = str(dataset.get("VOILUTFunction") or "LINEAR") == "LINEAR"
        middle, half = (center - 0.5, (width - 1) / 2) if linear and width > 1 else (center, width / 2)
        if np.isfinite([middle, half]).all() and half > 0:
            windows.append((middle - half, middle + half))
    return tuple(windows)


def _pixel_spacing(dataset: Any) -> tuple[float | None, float | None]:
    """Millimetres between rows and columns; of a projection at the detector, divided by its magnification."""
    values = _numbers(_shared(dataset, "PixelSpacing"))
    if len(values) != 2:
        values = _numbers(dataset.get("ImagerPixelSpacing"))
        magnification = _numbers(dataset.get("EstimatedRadiographicMagnificationFactor"))
        values = [value / magnification[0] for value in values] if magnification and magnification[0] > 0 else []
    checked = [_millimetres(value) for value in values]
    return (checked[0], checked[1]) if len(checked) == 2 and None not in checked else (None, None)


def _shared(dataset: Any, tag: str) -> Any:
    """A tag of the file, or of the functional groups of a multi-frame file that hold it."""
    if dataset.get(tag) is not None:
        return dataset.get(tag)
    places = ("PixelMeasuresSequence", "FrameVOILUTSequence")
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(dataset.get(name) or [])[:1]:
            for place in places:
                items = group.get(place)
                if items and items[0].get(tag) is not None:
                    return items[0].get(tag)
    return None


def _numbers(value: Any) -> list[float]:
    if value is None or value == "":
        return []
    try:
        return (
            [float(v) for v in value] if hasattr(value, "__iter__") and not isinstance(value, str) else [float(value)]
        )
    except (TypeError, ValueError):
        return []


def _millimetres(value: Any) -> float | None:
    numbers = _numbers(value)
    return numbers[0] if numbers and _SPACING_MM[0] <= numbers[0] <= _SPACING_MM[1] else None


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else (pixels >> (8 * pixels.dtype.itemsize - 8)).astype(np.uint8)


def _guessed_syntax(dataset: Any) -> Any:
    """Of a file without a meta header: uncompressed, as its data were read."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little in (None, True) else ExplicitVRBigEndian


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).replace(str(path), path.name) or type(error).__name__
    return ValueError(f"{path} must be a readable DICOM image, got: {reason[:300]}")
