"""Windows: which voxel values become black and white, by name, by numbers, from the header or from percentiles."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from ntpseg.utils.checks import brief
from ntpseg.volumes.geometry import Axis
from ntpseg.volumes.volume import Volume, display

# Hounsfield units at black and white: level -+ width / 2 as radiology displays CT.
WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-1350.0, 150.0),
    "soft-tissue": (-160.0, 240.0),
    "bone": (-200.0, 1000.0),
    "brain": (0.0, 80.0),
    "subdural": (-20.0, 180.0),
    "stroke": (20.0, 60.0),
    "mediastinum": (-125.0, 225.0),
    "abdomen": (-150.0, 250.0),
    "liver": (-45.0, 105.0),
    "angio": (0.0, 600.0),
}
_ALIASES = {"soft_tissue": "soft-tissue", "softtissue": "soft-tissue", "soft tissue": "soft-tissue", "lungs": "lung"}
# Of a volume's voxels, or of a deep image's pixels, that become black and white, as in nnU-Net's normalisation of CT.
PERCENTILES = (0.5, 99.5)
RULES = ("auto", "header", "percentile")
# Values that percentiles are taken of; every n-th voxel of a larger volume.
_SAMPLE = 4_000_000
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """A window as a user names it; see `parse_window`.

    Attributes:
        parts: one text, or three for the three channels: a name of `WINDOWS`, one of `RULES`, or "LOW..HIGH".
    """

    parts: tuple[str, ...] = ("auto",)

    def __str__(self) -> str:
        return "+".join(self.parts)


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """A volume as it is displayed; the windows are the same for all of its slices.

    Attributes:
        voxels: as in `Volume`.
        limits: ``(low, high)`` of each channel; none where the voxels are displayed as they are stored (colour, and
            8 bits under "auto").
        window: what was really used, as a text that `parse_window` reads: names, or "LOW..HIGH"; "" where `limits` is
            empty.
        inverted: low values are white (MONOCHROME1).
    """

    voxels: np.ndarray
    limits: tuple[tuple[float, float], ...]
    window: str
    inverted: bool = False

    def slice(self, index: int, axis: Axis = "axial") -> np.ndarray:
        """Slice `index` in the orientation of `Volume.slice`, uint8 ``[H, W]``, or ``[H, W, 3]`` in colour."""
        return self.apply(display(self.voxels, index, axis))

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Values in the unit of the voxels ``[...]`` to uint8 ``[...]`` or ``[..., 3]``; NaN becomes black."""
        if not self.limits:
            stored = np.ascontiguousarray(values).astype(np.uint8)
            return 255 - stored if self.inverted else stored
        channels = [_grey(values, low, high, self.inverted) for low, high in self.limits]
        return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)


def parse_window(text: str | WindowSpec) -> WindowSpec:
    """Read a window.

    Args:
        text: "auto", "header" (the file's own), "percentile" (0.5 and 99.5 of the volume), a name of `WINDOWS` in
            Hounsfield units, or "LOW..HIGH" in the unit of the voxels. Three of them joined by "+" become the three
            channels of a colour image. "auto" is the header's window, else soft-tissue for CT, else percentiles; MR is
            always by percentiles, because its headers' windows differ from slice to slice; 8-bit voxels stay as they
            are.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(text, WindowSpec):
        return text
    parts = tuple(_part(part.strip().lower(), text) for part in str(text).split("+"))
    if _RANGE.fullmatch(str(text).strip().lower()):
        parts = (_part(str(text).strip().lower(), text),)  # a "+" may be a sign
    if len(parts) not in (1, 3):
        raise ValueError(f"window must be one window, or three joined by +, got {brief(text)}")
    return WindowSpec(parts)


def render(volume: Volume, spec: str | WindowSpec = "auto") -> Rendered:
    """How a volume is displayed.

    Windows are computed once, over all voxels, so that neighbouring slices are equally bright. Colour volumes are
    displayed as they are.

    Raises:
        ValueError: "header" for a file without a window, or no voxel is finite.
    """
    spec = parse_window(spec)
    inverted = volume.header.inverted
    if volume.voxels.ndim == 4 or (spec.parts == ("auto",) and volume.voxels.dtype == np.uint8):
        return Rendered(volume.voxels, (), "", inverted and volume.voxels.ndim == 3)
    chosen = [_limits(volume, part) for part in spec.parts]
    return Rendered(
        volume.voxels, tuple(limits for _, limits in chosen), "+".join(name for name, _ in chosen), inverted
    )


def percentile_limits(values: np.ndarray) -> tuple[float, float]:
    """The `PERCENTILES` of the finite values; their extremes where the two are equal.

    Raises:
        ValueError: no value is finite.
    """
    flat = values.reshape(-1) if values.flags.c_contiguous else values.ravel()
    finite = flat[:: max(1, flat.size // _SAMPLE)]
    finite = finite[np.isfinite(finite)] if np.issubdtype(finite.dtype, np.floating) else finite
    if not finite.size and np.issubdtype(flat.dtype, np.floating):
        finite = flat[np.isfinite(flat)]
    if not finite.size:
        raise ValueError("voxels must be finite, got NaN or infinity in all of them")
    # Values that occur, so that a small picture loses none of its range.
    low = float(np.percentile(finite, PERCENTILES[0], method="lower"))
    high = float(np.percentile(finite, PERCENTILES[1], method="higher"))
    if low == high:
        finite = flat[np.isfinite(flat)] if np.issubdtype(flat.dtype, np.floating) else flat
        low, high = float(finite.min()), float(finite.max())
    return low, high


def looks_like_ct(volume: Volume) -> bool:
    """Whether the voxels are in Hounsfield units: the header says CT, or says nothing and there is air at -1000."""
    if volume.header.modality:
        return volume.header.modality == "CT"
    if volume.voxels.ndim != 3 or not np.issubdtype(volume.voxels.dtype, np.number) or volume.voxels.dtype.kind == "u":
        return False
    flat = volume.voxels.ravel()[:: max(1, volume.voxels.size // 200_000)]
    air = ((flat >= -1100) & (flat <= -900)).mean()
    return bool(air > 0.01 and np.nanmin(flat) >= -8192 and np.nanmax(flat) > -100)


def _part(part: str, text: object) -> str:
    part = _ALIASES.get(part, part)
    if part in WINDOWS or part in RULES:
        return part
    match = _RANGE.fullmatch(part)
    if match is None:
        known = ", ".join((*RULES, *WINDOWS))
        raise ValueError(f"window must be one of {known}, LOW..HIGH, or three of them joined by +, got {brief(text)}")
    low, high = float(match[1]), float(match[2])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"window must have a LOW below its HIGH, got {brief(text)}")
    return window_text(low, high)


def window_text(low: float, high: float) -> str:
    """ "LOW..HIGH", which `parse_window` reads back exactly."""
    return "..".join(str(int(value)) if value == int(value) else repr(float(value)) for value in (low, high))


def _limits(volume: Volume, part: str) -> tuple[str, tuple[float, float]]:
    """The text and the limits of one channel."""
    header = volume.header
    if part in WINDOWS:
        return part, WINDOWS[part]
    if part == "header" and not header.windows:
        raise ValueError("window must be in the file's header for 'header', got none; take 'percentile' or LOW..HIGH")
    if part == "auto" and not (header.windows and header.modality != "MR"):
        if looks_like_ct(volume):
            return "soft-tissue", WINDOWS["soft-tissue"]
        part = "percentile"
    if part == "percentile":
        low, high = percentile_limits(volume.voxels)
    elif part in RULES:
        low, high = header.windows[0]
    else:
        match = _RANGE.fullmatch(part)
        assert match is not None
        low, high = float(match[1]), float(match[2])
    return window_text(low, high), (low, high)


def _grey(values: np.ndarray, low: float, high: float, inverted: bool) -> np.ndarray:
    if low == high:
        return np.zeros(values.shape, np.uint8)
    # Halves, because the difference of two finite numbers may be infinite; float32 as far as it holds the values.
    exact = values.dtype.itemsize > 4 or (values.dtype.kind in "iu" and values.dtype.itemsize > 2)
    scaled = values.astype(np.float64 if exact else np.float32)
    scaled = (np.clip(scaled, low, high) / 2 - low / 2) / (high / 2 - low / 2)
    scaled = 1 - scaled if inverted else scaled
    return np.rint(np.nan_to_num(scaled, nan=0.0) * 255).astype(np.uint8)
