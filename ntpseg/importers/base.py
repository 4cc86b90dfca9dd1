"""What an importer yields: cases in a list, each of which is loaded when its turn comes, and left before the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ntpseg.volumes import Volume


@dataclass(frozen=True, slots=True)
class Structure:
    """Something that can be asked for in an image.

    Attributes:
        name: as the source calls it, such as "kidney_left".
        parts: ``(layer, value)``: the union of the pixels of ``Sample.labels[layer]`` that are `value`. A structure
            that the image may show and does not is listed too, for negatives.
        sentences: the source's own sentences, all of which become rows; (): sentences by templates.
        negatives: own sentences for images without it; (): by templates.
        fields: more words that templates may use.
    """

    name: str
    parts: tuple[tuple[int, int], ...] = ((0, 1),)
    sentences: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """An image or a volume, and what is marked in it.

    Attributes:
        image: a 2-D image file; uint8 pixels [H, W] or [H, W, 3]; or one to three volumes of one grid, which become
            grey or the channels of a colour image.
        labels: integer label maps, [H, W] or [D, H, W] as ``volume.voxels`` is (see `ntpseg.importers.alignment`);
            at least one, several where structures overlap.
        structures: what may be asked for, the same for all samples of a data set where the source lists them.
        modality: "CT", "MR", ...; "": as the volume's header says.
        spacing: millimetres between rows and columns of a 2-D image; None where unknown, and for volumes.
        ignored: values of label maps that the source says show nothing to ask for (0 always does); None: the labels
            were made by the importer, and every value belongs to a structure.
    """

    image: Path | np.ndarray | tuple[Volume, ...]
    labels: tuple[np.ndarray, ...]
    structures: tuple[Structure, ...]
    modality: str = ""
    spacing: tuple[float, float] | None = None
    ignored: frozenset[int] | None = None

    def unnamed(self) -> dict[int, int]:
        """Pixels of each value that is neither ignored nor of any structure: nobody says what they show."""
        found: Counter[int] = Counter()
        for layer, labels in enumerate(self.labels if self.ignored is not None else ()):
            parts = (part for structure in self.structures for part in structure.parts)
            named = sorted({0, *(self.ignored or ()), *(value for other, value in parts if other == layer)})
            # One slice at a time: NumPy looks values up with 8 bytes each.
            for plane in labels if labels.ndim > 2 else labels[None]:
                values, counts = np.unique(plane[~np.isin(plane, named)], return_counts=True)
                found.update(dict(zip(values.tolist(), counts.tolist())))
        return dict(found)


@dataclass(frozen=True, slots=True)
class Case:
    """An entry of a source.

    Attributes:
        name: unique in the source; files are called by it.
        subject: whose image it is: no subject is in two splits. Never a name or number from a DICOM header.
        load: reads the image and its labels. Raises ValueError or OSError with a line that names the file. None: an
            image without labels among those that should have them; it is left out and named.
        split: "train", "val" or "test" where the source says so; "": the subjects are dealt out.
        structures: of the whole source, where it lists them: names in the options are checked before any image is
            read. Otherwise each `Sample` lists its own.
    """

    name: str
    subject: str
    load: Callable[[], Sample] | None = field(repr=False)
    split: str = ""
    structures: tuple[Structure, ...] = field(default=(), repr=False)
