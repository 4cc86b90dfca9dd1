"""NIfTI files, through nibabel."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.volumes.extras import require
from ntpseg.volumes.volume import Header, Volume

# NIfTI's x and y grow to the patient's right and front; ours, as DICOM's, to the left and back.
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MILLIMETRES = {"mm": 1.0, "meter": 1000.0, "micron": 0.001, "unknown": 1.0}


def read_nifti(path: Path, volume: str | None = None) -> Volume:
    """Read a volume; the affine is the one that nibabel chooses, sform before qform before pixdim alone.

    Args:
        path: ``.nii``, ``.nii.gz`` or a pair of ``.hdr`` and ``.img``; the content decides.
        volume: of a 4-D file: which of its volumes, from "0".

    Raises:
        ValueError: the file is damaged, or holds several volumes and none is chosen; the message names it.
    """
    image = open_nifti(path)
    try:
        voxels = _scaled(image, path, volume)
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile, MemoryError) as error:
        raise _damaged(path, error) from error
    unit = _MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    affine = RAS_TO_LPS @ np.asarray(image.affine, np.float64)
    affine[:3] *= unit
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError(f"{path} must have an affine that can be inverted, got {np.round(image.affine, 4).tolist()}")
    placed = bool(image.header["sform_code"]) or bool(image.header["qform_code"])
    notes = () if placed else ("the file does not say how it lies in the patient (sform_code and qform_code are 0)",)
    known = bool((np.asarray(image.header["pixdim"][1:4]) > 0).all())
    return Volume.from_stored(voxels, affine, Header("nifti", spacing_known=known, notes=notes))


def open_nifti(path: Path) -> Any:
    """The nibabel image of a file whatever its name; its pixels are not read yet.

    Raises:
        ValueError: it is damaged or no NIfTI; the message names it.
    """
    nibabel = require("nibabel", "medical", "reading NIfTI")
    try:
        if path.name.lower().endswith((".nii", ".nii.gz", ".hdr", ".img", ".img.gz", ".hdr.gz")):
            return nibabel.load(path)
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        version = nibabel.Nifti2Image if content[4:7] in (b"n+2", b"ni2") else nibabel.Nifti1Image
        return version.from_bytes(content)
    except FileNotFoundError:
        raise
    except Exception as error:  # nibabel raises ImageFileError, HeaderDataError, struct.error, OSError ...
        raise _damaged(path, error) from error


def _scaled(image: Any, path: Path, volume: str | None) -> np.ndarray:
    """Voxels ``[D, H, W]`` or ``[D, H, W, 3]``, scl_slope applied, integers where it is 1."""
    shape = image.shape
    if 0 in shape:
        raise ValueError(f"{path} must have voxels, got the shape {list(shape)}")
    extra = int(np.prod(shape[3:]))
    index = 0
    if extra <= 1 and volume is not None:
        raise ValueError(f"series must be given for DICOM or a 4-D NIfTI, got {volume!r} for {path}; leave it out")
    if extra > 1:
        if volume is None:
            raise ValueError(
                f"{path} must hold one volume, got {extra} in a 4-D file; choose one with series 0..{extra - 1}"
            )
        if not volume.isdecimal() or int(volume) >= extra:
            raise ValueError(f"series must be 0..{extra - 1} for {path.name}, a 4-D file, got {volume!r}")
        index = int(volume)
    if image.get_data_dtype().names:
        pixels = np.asarray(image.dataobj)
        pixels = np.stack([pixels[name] for name in ("R", "G", "B")], axis=-1)
        pixels = pixels.reshape(*(*shape, 1, 1)[:3], -1, 3)[:, :, :, index]
        return pixels.transpose(2, 1, 0, 3)
    if len(shape) > 4 or extra == 1:
        whole = np.asanyarray(image.dataobj).reshape(*(*shape, 1, 1)[:3], extra, order="F")
        voxels = whole[..., index]
    else:
        voxels = np.asanyarray(image.dataobj[..., index])
    if voxels.dtype.kind == "c":
        raise ValueError(f"{path} must have real voxels, got complex ones")
    if voxels.dtype == np.float64 or voxels.dtype.itemsize > 8:
        # Half the memory; scaled integers keep every digit that they have.
        voxels = voxels.astype(np.float32)
    return voxels.transpose(2, 1, 0)


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).replace(str(path), path.name) or type(error).__name__
    return ValueError(f"{path} must be a readable NIfTI file, got: {reason}; copy it again")
