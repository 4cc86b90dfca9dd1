"""Small uploads, made in the test: pictures, archives, volumes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.data.images import encode_png

SHAPE = (6, 40, 56)
SPACING = (5.0, 2.0, 1.0)


def squares(height: int = 40, width: int = 56) -> np.ndarray:
    """Two bright squares on noise, as in `tiny_segmenter`, uint8 ``[H, W]``."""
    pixels = np.random.default_rng(3).integers(0, 60, (height, width)).astype(np.uint8)
    pixels[12:24, 4:16] += 150
    pixels[12:24, width - 16 : width - 4] += 150
    return pixels


def png() -> bytes:
    return encode_png(squares())


def nifti(folder: Path, suffix: str = ".nii.gz", shape: tuple[int, int, int] = SHAPE) -> bytes:
    """A volume whose slices are the squares; 5 mm between slices, pixels of 2 x 1 mm."""
    import nibabel

    voxels = np.stack([squares(*shape[1:])] * shape[0]).astype(np.int16)
    image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([-1.0, -2.0, 5.0, 1.0]))
    image.header.set_xyzt_units("mm")
    path = folder / f"volume{suffix}"
    nibabel.save(image, path)
    return path.read_bytes()


def nrrd(folder: Path) -> bytes:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.stack([squares()] * SHAPE[0]).astype(np.int16))
    image.SetSpacing(SPACING[::-1])
    SimpleITK.WriteImage(image, str(folder / "volume.nrrd"))
    return (folder / "volume.nrrd").read_bytes()


def archive(members: dict[str, bytes]) -> bytes:
    """A .zip of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def upload(client: Any, *files: tuple[str, bytes], **data: str) -> Any:
    """The answer to an upload."""
    return client.post("/api/images", files=[("files", file) for file in files], data=data)
