"""Where the voxels of a volume lie in the patient, and how an array is turned to the one orientation that we read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

Axis = Literal["axial", "coronal", "sagittal"]
AXES: tuple[Axis, ...] = ("axial", "coronal", "sagittal")
# Of each patient axis, the letters of its two ends: x to the left, y to the back, z to the head (DICOM, SimpleITK).
_LETTERS = ("RL", "AP", "IS")


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """The grid of a volume as a file stores it.

    Attributes:
        shape: voxels ``(D, H, W)`` along the array's axes k, j, i; i (columns) is the fastest.
        affine: float64 ``[4, 4]``, from voxel ``(i, j, k, 1)`` to millimetres in the patient, LPS: x grows to the
            patient's left, y to the back, z to the head, as in DICOM and SimpleITK. NIfTI's RAS has x and y negated.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise ValueError(f"affine must be an invertible [4, 4] matrix, got {affine.tolist()}")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape must be three positive numbers of voxels, got {self.shape}")
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between neighbouring voxels along k, j, i (slice, row, column)."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(lengths[2]), float(lengths[1]), float(lengths[0])

    @property
    def orientation(self) -> str:
        """Where i, j and k point, such as "LPS": the end of the patient axis that each is closest to."""
        axes, signs = self._closest()
        return "".join(_LETTERS[axis][sign > 0] for axis, sign in zip(axes, signs))

    def _closest(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The patient axis (0 x, 1 y, 2 z) that i, j and k are closest to, each another one, and their signs."""
        directions = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        voxel_axes, patient_axes = linear_sum_assignment(-np.abs(directions.T))
        chosen = tuple(int(axis) for axis in patient_axes[np.argsort(voxel_axes)])
        return chosen, tuple(1 if directions[axis, i] >= 0 else -1 for i, axis in enumerate(chosen))

    def to_lps(self, voxels: np.ndarray) -> tuple[np.ndarray, Geometry]:
        """Turn an array of this grid so that i, j, k run (nearly) to the patient's left, back and head.

        Only whole axes are swapped and flipped: no voxel is resampled.

        Args:
            voxels: ``[D, H, W, ...]`` with `shape` in front.

        Returns:
            The turned view, and its own grid.
        """
        self._check(voxels)
        axes, signs = self._closest()
        # Array axis 2 - n holds voxel axis n.
        order = [2 - axes.index(2 - place) for place in range(3)]
        flips = [signs[2 - axis] < 0 for axis in order]
        turned = np.transpose(voxels, (*order, *range(3, voxels.ndim)))
        turned = turned[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1
        for place, (axis, flip) in enumerate(zip(order, flips)):
            matrix[2 - axis, 2 - place] = -1 if flip else 1
            matrix[2 - axis, 3] = self.shape[axis] - 1 if flip else 0
        shape = (turned.shape[0], turned.shape[1], turned.shape[2])
        return turned, Geometry(shape, self.affine @ matrix)

    def from_lps(self, voxels: np.ndarray) -> np.ndarray:
        """Undo `to_lps`: an array of the turned grid, as an array of this one."""
        axes, signs = self._closest()
        order = [2 - axes.index(2 - place) for place in range(3)]
        flips = [signs[2 - axis] < 0 for axis in order]
        unflipped = voxels[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
        restored = np.transpose(unflipped, (*np.argsort(order), *range(3, voxels.ndim)))
        self._check(restored)
        return restored

    def _check(self, voxels: np.ndarray) -> None:
        if voxels.shape[:3] != tuple(self.shape):
            raise ValueError(f"voxels must have the grid's shape {list(self.shape)}, got {list(voxels.shape[:3])}")
