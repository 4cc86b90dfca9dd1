"""`Volume`: a CT or MR in one orientation, whatever file it came from, and its slices as they are displayed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ntpseg.utils.checks import check_choice
from ntpseg.volumes.geometry import AXES, Axis, Geometry


@dataclass(frozen=True, slots=True)
class Header:
    """All that is kept of a file's header: nothing here tells whose image it is.

    Attributes:
        source: "dicom", "nifti", "nrrd", "metaimage" or "array".
        modality: DICOM's code such as "CT", "MR", "DX"; "" where the file does not say.
        body_part: DICOM's BodyPartExamined in lower case; "" where the file does not say.
        windows: ``(low, high)`` of each window of the header, in the unit of the voxels.
        spacing_known: whether the file states its millimetres; without, the affine has 1 mm voxels.
        burnt_in: DICOM's BurnedInAnnotation; None where the file does not say.
        inverted: low values are displayed white (DICOM's MONOCHROME1); `voxels` holds them as stored.
        notes: what was odd about the file, in words and numbers, such as "gantry tilt of 12.0 degrees".
    """

    source: str = "array"
    modality: str = ""
    body_part: str = ""
    windows: tuple[tuple[float, float], ...] = ()
    spacing_known: bool = True
    burnt_in: bool | None = None
    inverted: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A volume, turned so that its axes run (nearly) to the patient's head, back and left.

    Attributes:
        voxels: ``[D, H, W]`` of any real dtype in the modality's unit (Hounsfield units for CT), or uint8
            ``[D, H, W, 3]`` in colour. Row 0 is the patient's front, column 0 the patient's right, slice 0 the feet:
            an axial slice ``voxels[k]`` is in radiological convention.
        geometry: grid of `voxels`.
        stored: grid of the file, to which results are turned back.
        header: what is kept of the file's header.
    """

    voxels: np.ndarray
    geometry: Geometry
    stored: Geometry
    header: Header = field(default_factory=Header)

    @classmethod
    def from_stored(cls, voxels: np.ndarray, affine: np.ndarray, header: Header | None = None) -> Volume:
        """A volume of an array as a file stores it.

        Args:
            voxels: ``[D, H, W]`` or ``[D, H, W, 3]``; the last of the three grid axes is the fastest, i.
            affine: ``[4, 4]``, from voxel ``(i, j, k, 1)`` to millimetres, LPS (see `Geometry`).
            header: see `Header`.

        Raises:
            ValueError: the affine cannot be inverted, or the array has another shape.
        """
        if voxels.ndim not in (3, 4) or (voxels.ndim == 4 and voxels.shape[3] != 3):
            raise ValueError(f"voxels must be [D, H, W] or [D, H, W, 3], got {list(voxels.shape)}")
        stored = Geometry((voxels.shape[0], voxels.shape[1], voxels.shape[2]), affine)
        turned, geometry = stored.to_lps(voxels)
        return cls(turned, geometry, stored, header or Header())

    def to_stored(self, voxels: np.ndarray) -> np.ndarray:
        """An array over `voxels`, such as a mask ``[D, H, W]``, on the file's own grid."""
        return np.ascontiguousarray(self.stored.from_lps(voxels))

    def count(self, axis: Axis = "axial") -> int:
        """Number of slices along `axis`."""
        return self.voxels.shape[_place(axis)]

    def slice(self, index: int, axis: Axis = "axial") -> np.ndarray:
        """Slice `index` as it is displayed, a view.

        axial: rows from front to back, columns from the patient's right to left. coronal: rows from head to feet,
        columns from right to left. sagittal: rows from head to feet, columns from front to back. Index 0 is at the
        feet, the front and the right.
        """
        return display(self.voxels, index, axis)

    def pixel_spacing(self, axis: Axis = "axial") -> tuple[float, float]:
        """Millimetres between the rows and between the columns of `slice`."""
        spacing = list(self.geometry.spacing)
        del spacing[_place(axis)]
        return spacing[0], spacing[1]


def display(voxels: np.ndarray, index: int, axis: Axis) -> np.ndarray:
    """Slice `index` of an array ``[D, H, W, ...]`` in the orientation of `Volume.slice`; a view that can be written."""
    view = np.moveaxis(voxels, _place(axis), 0)[index]
    return view if axis == "axial" else view[::-1]


def _place(axis: Axis) -> int:
    check_choice("axis", axis, AXES)
    return AXES.index(axis)
