"""What may be done to a volume's mask after its slices were segmented one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntpseg.utils.checks import check_bool, check_number


@dataclass(frozen=True, slots=True)
class PostProcessing:
    """How a volume's mask is cleaned; nothing by default.

    A model that saw only slices with the structure draws something in every slice, also in those without it: most of
    that is small, or apart from the structure.

    Attributes:
        largest_component: keep only the largest part that hangs together (voxels that share a face, 6-connected). Not
            for what may lie in several places, such as both lungs or metastases.
        min_ml: leave out parts of fewer millilitres.

    Raises:
        ValueError: a value out of range.
    """

    largest_component: bool = False
    min_ml: float = 0.0

    def __post_init__(self) -> None:
        check_bool("largest_component", self.largest_component)
        check_number("min_ml", self.min_ml, minimum=0)

    def check(self, spacing_known: bool) -> None:
        """Raise a `ValueError` for a volume without millimetres, where these are needed."""
        if self.min_ml and not spacing_known:
            raise ValueError(
                f"min_ml must be 0 where the file states no millimetres, got {self.min_ml:g}; leave --min-ml out"
            )

    def apply(self, mask: np.ndarray, voxel_ml: float) -> None:
        """Clean a mask in place.

        Args:
            mask: bool ``[D, H, W]``.
            voxel_ml: millilitres of a voxel.
        """
        if not (self.largest_component or self.min_ml) or not mask.any():
            return
        from scipy import ndimage

        parts, _ = ndimage.label(mask)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        kept = sizes * voxel_ml >= self.min_ml
        kept[0] = False
        if self.largest_component:
            kept &= np.arange(len(sizes)) == sizes.argmax()
        np.logical_and(mask, kept[parts], out=mask)
