"""Label volumes as NIfTI, on the grid of the volume that they belong to."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.utils.files import atomic_open
from ntpseg.volumes.extras import require
from ntpseg.volumes.geometry import Geometry
from ntpseg.volumes.nifti import RAS_TO_LPS, open_nifti

SUFFIXES = (".nii.gz", ".nii")
# All that says where the voxels lie; the texts of a header (descrip, db_name, aux_file, extensions) may name a patient.
_GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units"),
)


def write_label_nifti(path: Path, labels: np.ndarray, stored: Geometry, source: Path | None = None) -> None:
    """Write labels on the grid of a volume's file; the file appears whole or not at all.

    Args:
        path: ends in ``.nii.gz`` or ``.nii``.
        labels: ``[D, H, W]`` of an unsigned type, or of float32 for a map of probabilities, on the grid `stored`, as
            `Volume.to_stored` gives it.
        stored: the grid.
        source: the NIfTI file that the volume was read from; its shape, spacing, unit, and qform and sform with their
            codes are kept exactly. Without one, qform and sform are `stored` with code 1 (scanner).

    Raises:
        ValueError: nibabel is not installed, or `source` has another grid.
    """
    nibabel = require("nibabel", "medical", "writing NIfTI")
    original = None if source is None else open_nifti(source)
    # ANALYZE, which NIfTI grew out of, says nothing of where its voxels lie.
    if isinstance(original, (nibabel.Nifti1Pair, nibabel.Nifti2Pair)):
        image = _like(nibabel, labels, original, source)
    else:
        image = _placed(nibabel, labels, stored)
    with atomic_open(path) as file:
        if path.name.lower().endswith(".gz"):
            # Without a name and a time in it, equal labels give equal bytes.
            with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def _like(nibabel: Any, labels: np.ndarray, original: Any, source: Path | None) -> Any:
    shape = tuple(original.shape)
    voxels = labels.transpose(2, 1, 0)
    if shape[:3] != voxels.shape[: len(shape[:3])] or any(size != 1 for size in voxels.shape[len(shape) :]):
        raise ValueError(f"labels must have the grid of {source}, {list(shape[:3])}, got {list(voxels.shape)}")
    # Components behind the grid, such as colours, are not the labels'; an axis of one stays.
    shape = shape if len(shape) <= 4 and voxels.size == np.prod(shape) else voxels.shape
    kinds = {True: nibabel.Nifti2Image, False: nibabel.Nifti1Image}
    kind = kinds[isinstance(original.header, nibabel.Nifti2Header)]
    header = kind.header_class()
    header.set_data_dtype(labels.dtype)
    header.set_data_shape(shape)
    for name in _GEOMETRY:
        header[name] = original.header[name]
    # Without an affine of its own the image keeps what its header says, with the codes.
    return kind(voxels.reshape(shape), None, header)


def _placed(nibabel: Any, labels: np.ndarray, stored: Geometry) -> Any:
    affine = RAS_TO_LPS @ stored.affine
    image = nibabel.Nifti1Image(labels.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    # A qform holds no shear, such as a tilted gantry's.
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(None, code=0)
    return image
