"""Label maps on the grid of their images: checked, placed, or resampled on request."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import affine_transform

from ntpseg.volumes import Geometry, Volume

# Of a voxel: how far the corners of two grids may lie apart. Affines are stored as 32-bit numbers, and some twice.
TOLERANCE = 0.05


def aligned_labels(
    name: str, image: Volume, labels: Volume, *, resample: bool = False, cropped: bool = False
) -> np.ndarray:
    """A label map as an array over ``image.voxels``.

    Args:
        name: of the case, for the error.
        image: the image; both are turned to LPS already.
        labels: its label map; integers, perhaps stored as floats.
        resample: another grid is resampled to the image's: each voxel gets the label that its centre lies in.
        cropped: the label map may cover a part of the image, voxel on voxel, as 3D Slicer and DICOM store it; that
            resamples nothing.

    Returns:
        integers ``[D, H, W]``; 0 outside of the label map.

    Raises:
        ValueError: the grids differ, or the labels are no integers.
    """
    values = integer_labels(name, labels.voxels)
    known = image.header.spacing_known and labels.header.spacing_known
    if not known and labels.stored.shape == image.stored.shape:
        # Of one of them nobody knows how it lies: voxel on voxel, as the files store them.
        return image.stored.to_lps(labels.to_stored(values))[0]
    if known and values.shape == image.voxels.shape[:3] and grids_agree(image.geometry, labels.geometry):
        return values
    if cropped and known and (offset := _offset(image.geometry, labels.geometry)) is not None:
        return _placed(values, offset, image.geometry.shape)
    if not resample or not known:
        cure = "resample it (--resample)" if known else "export both with the same grid"
        raise ValueError(
            f"labels of {name} must have the image's grid, got {describe(labels.geometry)} for "
            f"{describe(image.geometry)}; {cure}"
        )
    return nearest_labels(values, labels.geometry, image.geometry)


def integer_labels(name: str, voxels: np.ndarray) -> np.ndarray:
    """Labels as integers; ValueError where they are colours, fractions or not finite."""
    if voxels.ndim == 4:
        raise ValueError(f"labels of {name} must be numbers, got a colour image; export the label map itself")
    if not np.issubdtype(voxels.dtype, np.integer) and voxels.dtype != bool:
        whole = np.rint(voxels)
        # NaN is equal to nothing.
        if not (whole == voxels).all() or np.abs(whole).max(initial=0) > np.iinfo(np.int32).max:
            raise ValueError(f"labels of {name} must be integers, got fractions; is it the image, or a probability?")
        voxels = whole.astype(np.int32)
    return voxels


def grids_agree(first: Geometry, second: Geometry) -> bool:
    """Whether two grids have one shape, and corners within `TOLERANCE` of the smallest voxel side."""
    if first.shape != second.shape:
        return False
    depth, height, width = first.shape
    corners = np.array([(i, j, k, 1) for i in (0, width - 1) for j in (0, height - 1) for k in (0, depth - 1)], float)
    apart = np.linalg.norm((corners @ (first.affine - second.affine).T)[:, :3], axis=1)
    return bool(apart.max() <= TOLERANCE * min(first.spacing))


def nearest_labels(values: np.ndarray, source: Geometry, target: Geometry) -> np.ndarray:
    """Resample a label map ``[D, H, W]`` from the grid `source` to `target` (nearest neighbour; 0 outside)."""
    # From voxel (i, j, k) of the target to that of the source; arrays have k, j, i.
    matrix = np.linalg.inv(source.affine) @ target.affine
    turned, shift = matrix[2::-1, 2::-1], matrix[2::-1, 3]
    result = np.zeros(target.shape, values.dtype)
    for index in range(target.shape[0]):
        # One slice at a time: coordinates of a whole volume take 24 bytes a voxel.
        plane = affine_transform(
            values, turned, shift + turned[:, 0] * index, (1, *target.shape[1:]), order=0, mode="grid-constant"
        )
        result[index] = plane[0]
    return result


def describe(geometry: Geometry) -> str:
    """``HxWxD voxels of AxBxC mm at (x, y, z)``, for messages; nothing of whose image it is."""
    depth, height, width = geometry.shape
    slices, rows, columns = geometry.spacing
    corner = ", ".join(f"{value:.5g}" for value in geometry.affine[:3, 3])
    return f"{width}x{height}x{depth} voxels of {columns:.4g}x{rows:.4g}x{slices:.4g} mm at ({corner})"


def _offset(image: Geometry, labels: Geometry) -> tuple[int, int, int] | None:
    """Voxel k, j, i of `image` on which voxel 0 of `labels` lies, where both have one lattice; None otherwise."""
    matrix = np.linalg.inv(image.affine) @ labels.affine
    offset = np.rint(matrix[:3, 3])
    grid = Geometry(labels.shape, image.affine @ np.block([[np.eye(3), offset[:, None]], [np.zeros((1, 3)), 1.0]]))
    return (int(offset[2]), int(offset[1]), int(offset[0])) if grids_agree(grid, labels) else None


def _placed(values: np.ndarray, offset: tuple[int, int, int], shape: tuple[int, int, int]) -> np.ndarray:
    result = np.zeros(shape, values.dtype)
    inside, source = [], []
    for start, size, limit in zip(offset, values.shape, shape):
        low, high = max(start, 0), min(start + size, limit)
        if low >= high:
            return result
        inside.append(slice(low, high))
        source.append(slice(low - start, high - start))
    result[tuple(inside)] = values[tuple(source)]
    return result
