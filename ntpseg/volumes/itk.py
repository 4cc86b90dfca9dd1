"""NRRD and MetaImage files, through SimpleITK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.volumes.extras import require
from ntpseg.volumes.volume import Header, Volume


def read_itk(path: Path, source: str) -> Volume:
    """Read a volume; SimpleITK gives directions in LPS whatever space the file states.

    Args:
        path: ``.nrrd``, ``.nhdr``, ``.mha`` or ``.mhd``.
        source: "nrrd" or "metaimage".

    Raises:
        ValueError: the file is damaged, or has other than one number or three colours in a voxel; the message names it.
    """
    image = open_itk(path)
    voxels = require("SimpleITK", "medical", "reading NRRD and MetaImage").GetArrayFromImage(image)
    dimensions, components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if components not in (1, 3) or (components == 3 and voxels.dtype != np.uint8):
        raise ValueError(f"{path} must have one number, or three of 8 bits, in a voxel, got {components}")
    if dimensions not in (2, 3):
        raise ValueError(f"{path} must hold one volume, got {dimensions} dimensions")
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(dimensions, dimensions)
    affine[:dimensions, :dimensions] = directions * np.array(image.GetSpacing())
    affine[:dimensions, 3] = image.GetOrigin()
    known = source != "nrrd" or any(image.HasMetaDataKey(key) for key in ("NRRD_space", "NRRD_space dimension"))
    return Volume.from_stored(voxels if dimensions == 3 else voxels[None], affine, Header(source, spacing_known=known))


def open_itk(path: Path) -> Any:
    """SimpleITK's image of a file.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    sitk = require("SimpleITK", "medical", "reading NRRD and MetaImage")
    warn = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        # Its messages name files of its own source; the last line says what is wrong.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[-1] if lines else "it cannot be read").replace(str(path), path.name)
        raise ValueError(f"{path} must be a readable volume, got: {reason}") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warn)
