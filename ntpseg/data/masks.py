"""Reading masks: which pixels are foreground, and when a file does not say so by itself.

A mask means one structure where it holds 0 and one other value, whatever that value is, or where it is a grey picture
of such a mask: 0 and its largest value, with the shades between them that smoothing or JPEG leave along the edges.
Anything else is a label map, or several grey levels, and `read_mask` wants to be told which class is meant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntpseg.data.pixels import Stored, StrPath, open_pixels
from ntpseg.data.records import Record, check_mask_value

# A mask with fewer foreground pixels holds no finding: noise, or a click beside the structure.
MIN_PIXELS = 4
# Integer masks whose largest value is at most this are label maps, never grey pictures.
LARGEST_LABEL = 15
# A lossless mask has few values, a grey picture with JPEG noise or smooth shades has more.
FEW_VALUES = 32
# With at most so many values none of them is noise.
_NOISELESS = 3
_LISTED = 8


@dataclass(frozen=True, slots=True)
class MaskContent:
    """What a mask file holds.

    Attributes:
        size: height and width.
        foreground: number of foreground pixels; None where the file holds several classes.
        classes: pixels of each value but background, the largest first, by the name that ``mask_value`` has to be.
        largest: the largest value.
        colour: the classes are colours.
        shades: the classes are shades of a grey picture, not labels.
        orientation: EXIF orientation that was applied, 1 where there was none.
        note: what is worth a look though it can be read; "" where nothing is.
    """

    size: tuple[int, int]
    foreground: int | None
    classes: dict[str, int]
    largest: float
    colour: bool = False
    shades: bool = False
    orientation: int = 1
    note: str = ""

    def area(self, value: str = "") -> int:
        """Number of pixels of the class `value`; "" for a file of one class.

        Raises:
            ValueError: there are several classes and `value` is "", or `value` cannot be looked for in this file.
        """
        number = self.check(value)
        if self.foreground is not None and (not value or self.shades):
            return self.foreground
        return self.classes.get(f"#{number:06x}" if self.colour else f"{number:.9g}", 0)

    def check(self, value: str) -> float:
        """`value` as a number (0 for ""); errors as of `area`."""
        if not value:
            if self.foreground is None:
                raise ValueError(self.several())
            return 0
        check_mask_value("mask_value", value)
        if value.startswith("#") != self.colour:
            wanted = "a colour such as #ff0000 for a coloured mask" if self.colour else "a number for a mask in grey"
            raise ValueError(f"mask_value must be {wanted}, got {value!r}")
        number = int(value[1:], 16) if self.colour else float(value)
        # The shades along the edges belong to the largest value; of any other they would be half a class.
        if self.shades and (self.foreground is None or (not self.colour and number != self.largest)):
            raise ValueError(f"mask_value must choose a label, got {value!r} for a mask of many grey levels")
        return number

    def several(self) -> str:
        """What is found where one class is expected, and how to choose."""
        listed = ", ".join(f"{name} ({count} pixels)" for name, count in list(self.classes.items())[:_LISTED])
        more = f" and {len(self.classes) - _LISTED} more" if len(self.classes) > _LISTED else ""
        if self.shades:
            return f"several grey levels, the commonest {listed}: save a mask of 0 and one other value, without loss"
        return f"several classes: {listed}{more}; choose one by a column mask_value of the table, or data.mask_value"


@dataclass(frozen=True, slots=True)
class DecodedMask:
    """A decoded file.

    Attributes:
        content: what it holds.
        values: [H, W], what ``mask_value`` is compared with: stored values, indices of a palette, or 0xRRGGBB.
        foreground: bool [H, W]; None where the file holds several classes.
    """

    content: MaskContent
    values: np.ndarray
    foreground: np.ndarray | None

    def select(self, value: str = "") -> np.ndarray:
        """The pixels of the class `value`, bool [H, W]; arguments and errors as of `MaskContent.area`."""
        number = self.content.check(value)
        return (
            self.foreground
            if self.foreground is not None and (not value or self.content.shades)
            else (self.values == number)
        )


def mask_content(path: StrPath) -> MaskContent:
    """What a mask file holds; errors as of `decode_mask`."""
    return decode_mask(path).content


def decode_mask(path: StrPath) -> DecodedMask:
    """Decode a mask file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be decoded, see `open_pixels`, or has NaN or infinite pixels; the message names it.
    """
    stored = open_pixels(path)
    values = stored.pixels
    if np.issubdtype(values.dtype, np.floating) and not (finite := np.isfinite(values)).all():
        raise ValueError(f"{path} must be a mask of finite values, got {int((~finite).sum())} NaN or infinite pixels")
    if stored.palette is not None:
        values = values if stored.alpha is None else np.where(stored.alpha > 0, values, 0)
        return _labels(stored, values, note=_palette_note(stored.palette, values))
    if stored.alpha is not None:
        values = _on_black(values, stored.alpha)
    if values.ndim == 3:
        if not ((values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all()):
            return _coloured(stored, values)
        values = values[..., 0]
    return _grey(stored, values)


def read_mask(path: StrPath, value: str = "") -> np.ndarray:
    """Read a mask as bool [H, W], upright (its EXIF orientation is applied).

    Foreground is every pixel that is not 0 in a file of 0 and one other value; what reaches half of the largest value
    in a grey picture of such a mask (smooth edges, JPEG); the one colour on black; a palette's index that is not 0,
    whatever its colour. Transparent pixels are background; where all that is painted is black, what is painted counts.

    Args:
        path: the file.
        value: the class to read, as in a table's column ``mask_value``: a value or palette index such as "2", or a
            colour such as "#ff0000"; "" for a file of one class.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be decoded, or holds several classes and `value` names none; the message names it.
    """
    mask = decode_mask(path)
    try:
        return mask.select(value)
    except ValueError as error:
        raise ValueError(f"{path} must be a mask of one class, got {error}") from error


def read_truth(record: Record) -> np.ndarray:
    """The mask of a record, bool [H, W]; all False where fewer than `MIN_PIXELS` are foreground: there is no finding.

    Raises:
        FileNotFoundError, ValueError: see `read_mask`; the record has no mask.
    """
    if record.mask is None:
        raise ValueError(f"record {record.case!r} must have a mask, got none")
    mask = read_mask(record.mask, record.mask_value)
    return mask if np.count_nonzero(mask) >= MIN_PIXELS else np.zeros_like(mask)


def _on_black(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha.astype(np.uint16)
    painted = ((pixels * (opacity if pixels.ndim == 2 else opacity[..., None]) + 127) // 255).astype(np.uint8)
    # Black on transparent: the shape is in the transparency alone.
    return painted if painted.any() or alpha.min() == alpha.max() else alpha


def _unique(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``np.unique(values, return_counts=True)``, for bytes without sorting them."""
    if values.dtype != np.uint8:
        return np.unique(values, return_counts=True)
    counts = np.bincount(values.ravel(), minlength=256)
    found = np.flatnonzero(counts)
    return found.astype(np.uint8), counts[found]


def _count(values: np.ndarray, colour: bool = False) -> dict[str, int]:
    found, counts = _unique(values)
    order = np.argsort(-counts, kind="stable")
    names = (f"#{int(v):06x}" if colour else f"{v.item():.9g}" for v in found[order])
    return {name: int(n) for name, n, v in zip(names, counts[order], found[order]) if v != 0}


def _labels(
    stored: Stored, values: np.ndarray, *, colour: bool = False, shades: bool = False, note: str = ""
) -> DecodedMask:
    """A file whose values are classes."""
    classes = _count(values, colour)
    one = len(classes) < 2 and not (classes and values.min() < 0)
    return _decoded(stored, values, values != 0 if one else None, classes, colour, shades, note)


def _decoded(
    stored: Stored,
    values: np.ndarray,
    foreground: np.ndarray | None,
    classes: dict[str, int],
    colour: bool,
    shades: bool,
    note: str = "",
) -> DecodedMask:
    content = MaskContent(
        size=(values.shape[0], values.shape[1]),
        foreground=None if foreground is None else int(np.count_nonzero(foreground)),
        classes=classes,
        largest=float(values.max()),
        colour=colour,
        shades=shades,
        orientation=stored.orientation,
        note=note,
    )
    return DecodedMask(content, values, foreground)


def _palette_note(palette: np.ndarray, values: np.ndarray) -> str:
    used = _unique(values)[0]
    if len(used) == 2 and used[0] == 0 and palette[0].astype(int).sum() > palette[used[1]].astype(int).sum():
        return f"palette: index {used[1]} is foreground, though index 0 is painted lighter"
    return ""


def _grey(stored: Stored, values: np.ndarray) -> DecodedMask:
    found = _unique(values)[0]
    integers = np.issubdtype(values.dtype, np.integer) or bool((found == np.floor(found)).all())
    if len(found) <= 2 or found[0] < 0 or (integers and found[-1] <= LARGEST_LABEL):
        # Two values of which none is 0 are two classes; a mask that is filled is one.
        return _labels(stored, values)
    few = len(found) <= FEW_VALUES
    if _is_picture_of_a_mask(values, found, few):
        return _decoded(stored, values, values >= found[-1] / 2, _count(values), colour=False, shades=True)
    return _labels(stored, values, shades=not few)


def _is_picture_of_a_mask(values: np.ndarray, found: np.ndarray, few: bool) -> bool:
    """Whether the values between 0 and the largest are the edges of one shape and noise, not classes of their own."""
    from scipy.ndimage import maximum_filter, minimum_filter

    levels = values.astype(np.float32)
    largest = float(found[-1])
    highest, lowest = maximum_filter(levels, 3), minimum_filter(levels, 3)
    if few:
        for value in found[(found > 0) & (found < found[-1])]:
            at = values == value
            area, flat = int(at.sum()), int((highest[at] == lowest[at]).sum())
            if len(found) > _NOISELESS and min(value, largest - value) <= largest / 16:
                # Noise of JPEG beside edges; a class so near to black or white has an inside.
                if 4 * flat >= area and area >= MIN_PIXELS:
                    return False
                continue
            between = int(((lowest[at] < levels[at]) & (levels[at] < highest[at])).sum())
            # A class has an inside, or is more than the shade between a darker and a lighter side.
            if flat or (area >= MIN_PIXELS and 2 * between < area):
                return False
        return True
    bright = max(int((levels >= largest / 2).sum()), 1)
    shades = (levels > largest * 0.25) & (levels < largest * 0.75)
    flat = shades & (highest - lowest <= largest / 32)
    return bool(flat.sum() < max(MIN_PIXELS, bright / 100) and shades.sum() <= max(4 * MIN_PIXELS, bright / 2))


def _coloured(stored: Stored, pixels: np.ndarray) -> DecodedMask:
    wide = pixels.astype(np.int64)
    codes = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    brightness = pixels.max(axis=2)
    bright = brightness >= max(int(brightness.max()) / 2, 1)
    hues = wide[bright] / brightness[bright][:, None]
    one_hue = (np.abs(hues - np.median(hues, axis=0)).max(axis=1) > 0.25).mean() < 0.01
    grey = _grey(stored, brightness) if one_hue else None
    if grey is not None and grey.foreground is not None:
        return _decoded(stored, codes, grey.foreground, _count(codes, True), colour=True, shades=grey.content.shades)
    return _labels(stored, codes, colour=True, shades=len(np.unique(codes)) > FEW_VALUES)
