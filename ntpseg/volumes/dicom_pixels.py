"""The voxels of DICOM files in the modality's unit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.volumes.dicom_headers import Plane, unvalidated
from ntpseg.volumes.extras import require

# What decoding needs of a file: the image pixel module, its tables and the pixels.
_WANTED = """
SamplesPerPixel PhotometricInterpretation PlanarConfiguration Rows Columns NumberOfFrames BitsAllocated BitsStored
HighBit PixelRepresentation SmallestImagePixelValue LargestImagePixelValue PixelPaddingValue PixelPaddingRangeLimit
RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor
RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
SegmentedBluePaletteColorLookupTableData ModalityLUTSequence ExtendedOffsetTable ExtendedOffsetTableLengths
PixelData FloatPixelData DoubleFloatPixelData
"""
_TAGS = tuple(_WANTED.split())


def read_pixels(planes: Sequence[Plane]) -> np.ndarray:
    """Decode slices, one file at a time, into one array.

    Rescale slope and intercept of each slice, or the modality lookup table, are applied; palettes and YBR become RGB;
    padding takes the value that is displayed darkest of all others.

    Args:
        planes: in the wanted order, of one size.

    Returns:
        ``[D, H, W]``, int16 or int32 where every slope and intercept is whole, else float32; or uint8 ``[D, H, W, 3]``.

    Raises:
        ValueError: a file is damaged or has no decoder here; the message names it.
    """
    first = planes[0]
    shape = (len(planes), *first.size)
    voxels = np.empty((*shape, 3), np.uint8) if first.colour else np.empty(shape, _dtype(planes))
    padding: np.ndarray | None = None
    places: dict[Path, list[int]] = {}
    for index, plane in enumerate(planes):
        places.setdefault(plane.path, []).append(index)
    for path, indices in places.items():
        dataset = _dataset(path)
        frames = _decoded(path, dataset, planes[indices[0]])
        table = bool(dataset.get("ModalityLUTSequence"))
        if table and not first.colour:
            voxels = voxels.astype(np.promote_types(voxels.dtype, np.int32), copy=False)
        for index in indices:
            stored = frames[planes[index].frame]
            if first.colour:
                voxels[index] = stored
                continue
            _scale(voxels[index], path, stored, planes[index], dataset if table else None)
            outside = _padding(stored, dataset)
            if outside is not None:
                padding = np.zeros(shape, bool) if padding is None else padding
                padding[index] = outside
    if padding is not None and not padding.all():
        inside = voxels[~padding]
        voxels[padding] = inside.max() if first.inverted else inside.min()
    return voxels


def _dtype(planes: Sequence[Plane]) -> Any:
    """The smallest dtype that holds whatever the stored bits can become."""
    if any(plane.slope % 1 or plane.intercept % 1 for plane in planes):
        return np.float32
    ends = []
    for plane in planes:
        stored = (-(2 ** (plane.bits - 1)), 2 ** (plane.bits - 1) - 1) if plane.signed else (0, 2**plane.bits - 1)
        ends += [end * plane.slope + plane.intercept for end in stored]
    for dtype in (np.uint8, np.int16, np.int32):
        # Hounsfield units are signed whatever the file stores.
        if min(ends) >= np.iinfo(dtype).min and max(ends) <= np.iinfo(dtype).max:
            return dtype
    return np.float32


def _dataset(path: Path) -> Any:
    pydicom = require("pydicom", "medical", "reading DICOM")
    try:
        with unvalidated():
            dataset = pydicom.dcmread(path, specific_tags=list(_TAGS), force=True)
        if not getattr(dataset.file_meta, "TransferSyntaxUID", None):
            dataset.file_meta.TransferSyntaxUID = _guessed_syntax(dataset)
    except Exception as error:  # pydicom raises anything on a damaged file
        raise ValueError(f"{path} must be a readable DICOM file, got a damaged one; copy it again") from error
    if not any(tag in dataset for tag in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ValueError(f"{path} must hold pixels, got a DICOM header without them; copy it again")
    return dataset


def _decoded(path: Path, dataset: Any, plane: Plane) -> np.ndarray:
    """All frames of a file as stored, ``[N, H, W]``, or RGB uint8 ``[N, H, W, 3]``."""
    from pydicom.pixels import apply_color_lut, pixel_array

    try:
        pixels = pixel_array(dataset)
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
    except Exception as error:  # decoders raise anything
        syntax = getattr(dataset.file_meta.TransferSyntaxUID, "name", "unknown")
        reason = " ".join(str(error).split()).replace(str(path), path.name)[:200] or type(error).__name__
        raise ValueError(f"{path} must have pixels that can be decoded, got {syntax}: {reason}") from error
    if plane.colour:
        if pixels.dtype != np.uint8:
            bits = 8 * pixels.dtype.itemsize if "PALETTE" in str(dataset.PhotometricInterpretation) else plane.bits
            pixels = (pixels >> max(0, bits - 8)).astype(np.uint8)
        pixels = pixels[..., :3]
    return pixels if plane.frames > 1 else pixels.reshape(1, *pixels.shape[-3 if plane.colour else -2 :])


def _scale(target: np.ndarray, path: Path, stored: np.ndarray, plane: Plane, table: Any) -> None:
    if stored.shape != target.shape:
        raise ValueError(f"{path} must have {plane.size[1]}x{plane.size[0]} pixels, got {list(stored.shape)}")
    if table is not None:
        from pydicom.pixels import apply_modality_lut

        target[:] = apply_modality_lut(stored, table)
        return
    if stored.dtype.kind == "f" and target.dtype.kind != "f":
        raise ValueError(f"{path} must have whole pixels like the other slices, got {stored.dtype}")
    if target.dtype.kind == "f":
        target[:] = stored.astype(np.float64) * plane.slope + plane.intercept
    else:
        target[:] = stored.astype(np.int64) * int(plane.slope) + int(plane.intercept)


def _padding(stored: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Stored pixels outside of the scanner's field, PS3.3 C.7.5.1.1.2; None where there are none."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if not isinstance(value, int):
        return None
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    outside = (stored >= low) & (stored <= high)
    return outside if outside.any() else None


def _guessed_syntax(dataset: Any) -> Any:
    """Of a file without a meta header: uncompressed, as its data were read."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little in (None, True) else ExplicitVRBigEndian
