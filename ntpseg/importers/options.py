"""`ImportOptions`: how a data set is sliced, and which sentences ask for its structures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ntpseg.utils.checks import check_bool, check_choice, check_integer, check_number


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """Options of an import.

    Attributes:
        axis: "axial", "coronal" or "sagittal": across which slices are taken.
        window: how voxels become 8 bits: "auto", "header", "percentile", a name such as "lung", "LOW..HIGH", or three
            of them joined by "+" for the three channels (see `ntpseg.volumes.windows`).
        size: largest side of the PNGs in pixels; 0: no image and no mask is resampled.
        min_pixels: a structure with fewer pixels in a slice is not asked for there. Fewer than 4 are no mask to any
            command.
        min_area_mm2: the same in square millimetres, where the spacing is known.
        negatives: rows for structures that are absent in their slice, for each row with a finding of the same volume
            (0.25: one for four); their mask is empty. They are drawn from slices that show another structure; from all
            in a volume (or of a 2-D image) that shows none.
        empty_slices: slices that show no structure get one such row each.
        sentences: different sentences drawn for a structure in a slice; 0: all that the templates give. Sentences of
            the data set itself are all kept.
        templates: YAML or JSON file, see `ntpseg.importers.templates`; None: sentences from the structures' names.
        structures: names, or patterns such as "vertebrae_*", of what is asked for; ("listed",): what the file of
            templates lists; (): all.
        names: file of the labels' names, for sources that have none of their own.
        channels: of sources with several, one for grey or up to three for colour, by name or number.
        resample: a label map on another grid than its image's is resampled to it (nearest neighbour).
        splits: fractions of the subjects in train, val and test where the source does not say.
        seed: of sentences, negatives and splits.
        skip_bad: cases that cannot be read are left out and listed; otherwise the first one ends the import.

    Raises:
        ValueError: an option is out of range.
    """

    axis: str = "axial"
    window: str = "auto"
    size: int = 0
    min_pixels: int = 4
    min_area_mm2: float = 0.0
    negatives: float = 0.0
    empty_slices: bool = False
    sentences: int = 1
    templates: Path | None = None
    structures: tuple[str, ...] = ()
    names: Path | None = None
    channels: tuple[str, ...] = ()
    resample: bool = False
    splits: tuple[float, float, float] = (0.70, 0.15, 0.15)
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_choice("axis", self.axis, ("axial", "coronal", "sagittal"))
        check_integer("size", self.size, 0)
        if 0 < self.size < 16:
            raise ValueError(f"size must be 0 or at least 16 pixels, got {self.size}")
        # Every command takes a mask of fewer pixels for an empty one (ntpseg.data.masks.MIN_PIXELS).
        check_integer("min_pixels", self.min_pixels, 4)
        check_number("min_area_mm2", self.min_area_mm2, 0)
        check_number("negatives", self.negatives, 0, 100)
        check_integer("sentences", self.sentences, 0)
        check_integer("seed", self.seed, 0)
        for name in ("empty_slices", "resample", "skip_bad"):
            check_bool(name, getattr(self, name))
        if len(self.channels) > 3:
            raise ValueError(f"channels must be one to three, got {len(self.channels)}: {', '.join(self.channels)}")
        if (
            len(self.splits) != 3
            or not all(fraction >= 0 for fraction in self.splits)
            or abs(sum(self.splits) - 1) > 1e-6
        ):
            given = ":".join(f"{fraction:g}" for fraction in self.splits)
            raise ValueError(f"splits must be three fractions of sum 1 (train, val, test), got {given}")
