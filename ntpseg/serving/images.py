"""An uploaded picture or volume, in memory, and the masks that belong to it."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ntpseg.utils.checks import brief
from ntpseg.volumes import AXES, Axis, Geometry, Volume
from ntpseg.volumes.volume import display

# Rendered windows kept per volume; each holds no more than its limits.
RENDERED = 8


@dataclass(frozen=True, slots=True, eq=False)
class StoredMask:
    """The mask of one sentence.

    Attributes:
        text: the sentence.
        mask: bool ``[H, W]`` of a slice, as displayed, or ``[D, H, W]`` on the grid of `Volume.voxels`.
        probability: uint8 of the same shape, 255 is 1.
        axis, index: the slice; None for a whole volume, and for a picture.
    """

    text: str
    mask: np.ndarray
    probability: np.ndarray
    axis: Axis | None = None
    index: int | None = None

    def slice(self, form: str, index: int, axis: Axis) -> np.ndarray:
        """`mask` or, as `form` says, `probability`, of a slice."""
        values = self.mask if form == "mask" else self.probability
        return values if values.ndim == 2 else display(values, index, axis)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.mask.nbytes + self.probability.nbytes


@dataclass(eq=False)
class StoredImage:
    """One upload.

    Attributes:
        picture: uint8 ``[H, W]`` or ``[H, W, 3]``; None for a volume.
        volume: None for a picture.
        masks: by their ids, oldest first.
    """

    picture: np.ndarray | None = None
    volume: Volume | None = None
    masks: OrderedDict[str, StoredMask] = field(default_factory=OrderedDict)
    _rendered: OrderedDict[str, Any] = field(default_factory=OrderedDict)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, masks included."""
        pixels = self.picture if self.volume is None else self.volume.voxels
        assert pixels is not None
        return pixels.nbytes + sum(mask.nbytes for mask in list(self.masks.values()))

    def add(self, mask: StoredMask, limit: int) -> str:
        """Keep a mask, and forget the oldest beyond `limit`; its id."""
        name = secrets.token_urlsafe(12)
        self.masks[name] = mask
        while len(self.masks) > limit:
            self.masks.popitem(last=False)
        return name

    def axes(self) -> list[dict[str, Any]]:
        """Of each way to cut it: the number of slices, their size and, where known, the millimetres of a pixel."""
        if self.volume is None:
            assert self.picture is not None
            height, width = self.picture.shape[:2]
            return [{"axis": "axial", "count": 1, "height": height, "width": width, "spacing": None}]
        found = []
        # A file of one slice has no other cut.
        for axis in AXES[:1] if self.volume.count("axial") == 1 else AXES:
            height, width = self.volume.slice(0, axis).shape[:2]
            spacing = self.volume.pixel_spacing(axis) if self.volume.header.spacing_known else None
            count = self.volume.count(axis)
            found.append({"axis": axis, "count": count, "height": height, "width": width, "spacing": spacing})
        return found

    def pixels(self, axis: Axis, index: int, window: str) -> np.ndarray:
        """A slice as it is displayed and as a model reads it, uint8 ``[H, W]`` or ``[H, W, 3]``.

        Raises:
            ValueError: a window that cannot be.
        """
        if self.volume is None:
            assert self.picture is not None
            return self.picture
        return self._render(window).slice(index, axis)

    def check_place(self, axis: str, index: int) -> Axis:
        """Raise a `ValueError` unless there is such a slice."""
        for known in self.axes():
            if known["axis"] == axis:
                if not 0 <= index < known["count"]:
                    raise ValueError(f"index must be within [0, {known['count']}), got {index}")
                return known["axis"]
        raise ValueError(f"axis must be one of the image's, got {brief(axis)}")

    def _render(self, window: str) -> Any:
        from ntpseg.volumes.windows import parse_window, render

        assert self.volume is not None
        if window not in self._rendered:
            self._rendered[window] = render(self.volume, parse_window(window))
            while len(self._rendered) > RENDERED:
                self._rendered.popitem(last=False)
        return self._rendered[window]

    @property
    def stored(self) -> Geometry | None:
        """Grid of the volume's file."""
        return None if self.volume is None else self.volume.stored
