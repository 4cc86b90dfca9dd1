"""Opening image files that anyone may have made: what is read, what is refused, and which way up it is."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ntpseg.data.shards.files import PackedFile
from ntpseg.data.shards.paths import as_path

if TYPE_CHECKING:
    from ntpseg.volumes.volume import Volume

StrPath = str | PathLike[str]

# A picture of 8192 x 8192; decoded it takes up to 256 MiB. A file says its size before anything of it is decoded.
MAX_PIXELS = 2**26
# Raster formats that Pillow decodes itself: not EPS, for which it starts another program.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "GIF", "WEBP", "PPM", "JPEG2000", "TGA")
_ORIENTATION = 274  # EXIF tag

# Pillow's own limits are above MAX_PIXELS, so whatever they would warn of is refused here in one line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Stored:
    """A decoded file.

    Attributes:
        pixels: as stored, but upright: [H, W] of any dtype (palette indices of a palette image), or uint8 [H, W, 3].
        alpha: uint8 [H, W], 0 where transparent; None where the file knows no transparency.
        palette: uint8 [N, 3], the colours of the indices; None for all other images.
        orientation: EXIF orientation that was applied, 1 where there was none to apply.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    palette: np.ndarray | None = None
    orientation: int = 1


def open_pixels(path: StrPath) -> Stored:
    """Decode an image file; the turn that its EXIF orientation asks for is applied.

    A DICOM file of one frame and a 2-D NIfTI, NRRD or MetaImage file are images too: in the modality's unit, as stored
    (rows and columns of a radiograph are those that it is displayed by).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not an image, damaged, larger than `MAX_PIXELS`, or has several pages; the message names it.
    """
    path = as_path(path)
    medical = medical_pixels(path)
    return picture_pixels(path) if medical is None else Stored(medical.voxels[0])


def picture_pixels(path: Path) -> Stored:
    """`open_pixels` of a file that is none of `medical_pixels`."""
    image, orientation = _open(path)
    mode = image.mode
    if mode in ("L", "RGB", "F", "I") or mode.startswith("I;16"):
        stored = Stored(np.array(image), None, None, orientation)
        return stored if "transparency" not in image.info else _with_alpha(image, stored)
    if mode == "1":
        return Stored(np.array(image.convert("L")), None, None, orientation)
    if mode == "P":
        colours = np.array(image.getpalette("RGB") or [0, 0, 0], np.uint8).reshape(-1, 3)
        # A file may use indices that its palette does not have; Pillow paints these black.
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(colours)] = colours[:256]
        stored = Stored(np.array(image), None, palette, orientation)
        return stored if "transparency" not in image.info else _with_alpha(image, stored)
    if mode in ("PA", "LA", "La", "RGBA", "RGBa"):
        rgba = np.array(image.convert("RGBA"))
        return Stored(np.ascontiguousarray(rgba[..., :3]), rgba[..., 3].copy(), None, orientation)
    return Stored(np.array(image.convert("RGB")), None, None, orientation)


def medical_pixels(path: Path) -> Volume | None:
    """A DICOM, NIfTI, NRRD or MetaImage file of one slice, ``voxels`` ``[1, H, W]`` as stored; None for others.

    Raises:
        ValueError: it is a volume, larger than `MAX_PIXELS`, damaged, or its package is not installed.
    """
    from ntpseg.volumes.contents import kind_of
    from ntpseg.volumes.reading import has_several_slices, read_volume

    if not path.is_file() or kind_of(path) is None:
        return None
    path = Path(os.fspath(path))
    if has_several_slices(path):
        raise ValueError(
            f"{path} must be a 2-D image, got a volume; slice it with ntpseg data import, or give it to ntpseg predict"
        )
    volume = read_volume(path)
    pixels = volume.to_stored(volume.voxels)
    if pixels.shape[0] != 1:
        raise ValueError(f"{path} must have its one slice along the last axis, got {list(pixels.shape[::-1])} voxels")
    if pixels.shape[1] * pixels.shape[2] > MAX_PIXELS:
        size = f"{pixels.shape[2]}x{pixels.shape[1]}"
        raise ValueError(f"{path} must have at most {MAX_PIXELS:,} pixels, got {size}; shrink or cut it")
    return replace(volume, voxels=pixels)


def _opened(path: Path) -> Any:
    """What Pillow opens: a path, or the bytes of a file in a shard, of which a copy on the disk would be made else."""
    return path.open("rb") if isinstance(path, PackedFile) else path


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in range(2, 9) else 1


def _with_alpha(image: Image.Image, stored: Stored) -> Stored:
    if image.mode not in ("L", "RGB", "P"):
        return stored
    alpha = np.array(image.convert("RGBA"))[..., 3].copy()
    return Stored(stored.pixels, alpha if (alpha < 255).any() else None, stored.palette, stored.orientation)


def _open(path: Path) -> tuple[Image.Image, int]:
    if not path.exists():
        raise FileNotFoundError(f"{path} must be an image file, got none of that name")
    if not path.is_file():
        raise ValueError(f"{path} must be an image file, got a folder or a device")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} must be a readable image file, got an empty one (0 bytes); copy it again")
    try:
        image = Image.open(_opened(path), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} must be a readable image file, got {_described(path)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} must have at most {MAX_PIXELS:,} pixels, got more; shrink or cut it") from error
    except Exception as error:
        raise _unreadable(path, error) from error
    if image.mode[:1] not in ("I", "F") and any(";16" in str(tile[3]) for tile in image.tile):
        image.close()
        raise ValueError(
            f"{path} must have 8 bits a channel, or be grey with 16, got 16 bits of colour or transparency, of which "
            "half would be lost; save it again"
        )
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{path} must have at most {MAX_PIXELS:,} pixels, got {width}x{height}; shrink or cut it")
    try:
        with image:
            if _has_pages(image):
                raise ValueError("several pages or frames; save the one that counts as a file of its own")
            image.load()
            orientation = _orientation(image)
            return (ImageOps.exif_transpose(image) if orientation != 1 else image), orientation
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... on broken files
        raise _unreadable(path, error) from error


def _has_pages(image: Image.Image) -> bool:
    """Whether there is a second picture of the same size; a thumbnail or a smaller level of a pyramid is none."""
    # A JPEG's second picture (MPO) is a preview or the other eye's view.
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return False
    size = image.size
    try:
        image.seek(1)
        return image.size == size
    finally:
        image.seek(0)


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).replace(str(path), path.name) or type(error).__name__
    return ValueError(f"{path} must be a readable image file, got: {reason}")


def _described(path: Path) -> str:
    """What a file that is no image is instead."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        return f"one that cannot be opened ({error.strerror})"
    if start.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"<":
        return "a web page or XML: a download that failed?"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the file: run git lfs pull"
    if start[:2] == b"\x1f\x8b":
        return "a compressed file: unpack it"
    if start[:2] == b"%!":
        return "PostScript, which is not read: export it as PNG"
    return "something else (cannot identify an image in it)"
