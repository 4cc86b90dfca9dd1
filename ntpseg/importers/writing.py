"""Writing an import: one PNG for each picture, one for each mask, and ``manifest.csv`` with a row for each sentence.

::

    OUT/images/CASE/axial_0042.png             2-D images: OUT/images/CASE.png
    OUT/masks/CASE/axial_0042_liver.png        2-D images: OUT/masks/CASE/liver.png
    OUT/masks/CASE/empty.png                   of the rows without a finding
    OUT/manifest.csv

One case is in memory at a time; the folder appears complete or not at all.
"""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ntpseg.importers.base import Case, Structure
from ntpseg.importers.options import ImportOptions
from ntpseg.importers.slices import Slices, resized, resized_mask, slices_of, target_shape
from ntpseg.importers.splits import assign_splits
from ntpseg.importers.templates import Target, Templates, read_templates
from ntpseg.utils.checks import one_line
from ntpseg.utils.files import atomic_folder, safe_cell
from ntpseg.utils.outputs import check_folder, check_not_mounted, name_key
from ntpseg.utils.progress import StageCallback
from ntpseg.volumes.windows import parse_window

COLUMNS = (
    "image", "mask", "text", "split", "subject", "case", "structure", "modality",
    "volume", "axis", "slice", "slice_mm", "row_mm", "column_mm", "window",
)  # fmt: skip
# Names of files keep room for a counter, and for what other programs add.
_NAME_LENGTH = 80
# Of zlib: level 6 writes a slice four times as long to save 3 % of its bytes.
_COMPRESSION = 3
# Values without a name that are listed: an image in the place of a label map has thousands.
_REMARKS = 5


@dataclass(slots=True)
class Imported:
    """What an import wrote.

    Attributes:
        folder: the data set.
        cases: number of cases that were read.
        images: number of images.
        masks: number of masks with a finding.
        rows: rows of each split.
        negatives: rows whose mask is empty.
        small: structures in slices that were left out because they have too few pixels.
        unasked: cases with no row.
        skipped: why each case that could not be read was left out.
        unlabelled: cases with an image and no labels, which were left out.
        unnamed: pixels of values that belong to no structure, by value and case: they are in no mask.
    """

    folder: Path
    cases: int = 0
    images: int = 0
    masks: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    negatives: int = 0
    small: int = 0
    unasked: int = 0
    skipped: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    unnamed: dict[int, dict[str, int]] = field(default_factory=dict)

    def remarks(self) -> list[str]:
        """A line for each thing in the source that nobody may have known of."""
        lines = []
        if self.unlabelled:
            names = ", ".join(self.unlabelled[:3]) + ", ..." * (len(self.unlabelled) > 3)
            number = len(self.unlabelled)
            were = "1 image has no labels, and was" if number == 1 else f"{number} images have no labels, and were"
            lines.append(f"{were} left out: {names}")
        for value, cases in sorted(self.unnamed.items())[:_REMARKS]:
            others = f" and {len(cases) - 1} other cases" if len(cases) > 1 else ""
            lines.append(
                f"{sum(cases.values())} pixels of value {value} in {next(iter(cases))}{others} belong to no label, and "
                "are in no mask: name the value, or call it ignore"
            )
        if len(self.unnamed) > _REMARKS:
            lines.append(f"{len(self.unnamed) - _REMARKS} more values belong to no label")
        return lines


def write_dataset(
    cases: Sequence[Case], out: Path, options: ImportOptions, *, progress: StageCallback | None = None
) -> Imported:
    """Write cases as a data set with a manifest; arguments and errors as of `ntpseg.importers.import_dataset`."""
    unlabelled = [case.name for case in cases if case.load is None]
    cases = [case for case in cases if case.load is not None]
    if not cases:
        raise ValueError("source must hold at least one image with its labels, got none")
    check_folder("out", out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, got {out}, which is not empty")
    check_not_mounted("out", out)
    parse_window(options.window)
    templates = read_templates(options.templates)
    listed = _merged(case.structures for case in cases)
    if all(case.structures for case in cases):
        templates.check_known(listed, options.structures)
        templates.targets(listed, options.structures)
    splits = assign_splits(cases, options.splits, options.seed)
    names = distinct_names([case.name for case in cases])
    result = Imported(out, unlabelled=unlabelled)
    seen: dict[str, Structure] = {}
    with (
        atomic_folder(out, replace=False) as folder,
        (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for number, (case, name, split) in enumerate(zip(cases, names, splits), start=1):
            loaded = _load(case, options, result)
            if progress is not None:
                progress("import", number, len(cases))
            if loaded is None:
                continue
            pictures, structures = loaded
            seen |= {structure.name: structure for structure in structures}
            writer = _CaseWriter(folder, name, case, split, options, templates, result)
            rows = writer.write(pictures, structures)
            table.writerows([safe_cell(cell) for cell in row] for row in rows)
            result.cases += 1
            result.rows[split] += len(rows)
            result.unasked += not rows
        templates.check_known(list(seen.values()), options.structures)
        _check_result(result)
    return result


def _load(case: Case, options: ImportOptions, result: Imported) -> tuple[Slices, tuple[Structure, ...]] | None:
    assert case.load is not None
    try:
        sample = case.load()
        unnamed = sample.unnamed()
        if unnamed and (options.negatives or options.empty_slices):
            value, pixels = next(iter(unnamed.items()))
            raise ValueError(
                f"labels of {case.name} must all have a name for --negatives and --empty-slices, got {pixels} pixels "
                f"of value {value}: what shows there is not known to be absent; name the value, or call it ignore"
            )
        pictures = slices_of(case.name, sample, options)
    except (ValueError, OSError) as error:
        if not options.skip_bad:
            raise
        result.skipped.append(f"{case.name}: {one_line(error)}")
        return None
    for value, pixels in unnamed.items():
        result.unnamed.setdefault(value, {})[case.name] = pixels
    return pictures, sample.structures


class _CaseWriter:
    """Writes the images and masks of one case into `folder`, and counts them in `result`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        case: Case,
        split: str,
        options: ImportOptions,
        templates: Templates,
        result: Imported,
    ) -> None:
        self._folder, self._name, self._case, self._split = folder, name, case, split
        self._options, self._templates, self._result = options, templates, result
        self._made: set[Path] = set()
        self._files: dict[str, str] = {}

    def write(self, pictures: Slices, structures: tuple[Structure, ...]) -> list[list[Any]]:
        """Write every picture that has a row; the rows of the manifest."""
        targets = self._templates.targets(structures, self._options.structures)
        self._files = dict(
            zip((target.name for target in targets), distinct_names([target.name for target in targets]))
        )
        found: dict[int, list[Target]] = {}
        absent: dict[int, list[Target]] = {}
        rows: dict[int, list[list[Any]]] = {}
        for index in range(pictures.count):
            present = _Present(pictures, index)
            least = self._least(pictures)
            found[index], absent[index], rows[index] = [], [], []
            for target in targets:
                area = present.area(target.parts)
                if area == 0:
                    absent[index].append(target)
                    continue
                found[index].append(target)
                mask = resized_mask(present.mask(target.parts), self._options.size) if area >= least else None
                # Shrinking may leave too little of what was large enough.
                if mask is None or np.count_nonzero(mask) < self._options.min_pixels:
                    self._result.small += 1
                    continue
                path = self._path("masks", pictures, index, self._files[target.name])
                self._save(path, mask)
                self._result.masks += 1
                rows[index] += self._rows(pictures, index, target, path, self._sentences(index, target))
        self._add_negatives(pictures, found, absent, rows)
        for index in rows:
            if rows[index]:
                pixels = resized(pictures.pixels(index), self._options.size)
                self._save(self._path("images", pictures, index), pixels)
                self._result.images += 1
        return [row for index in rows for row in rows[index]]

    def _least(self, pictures: Slices) -> float:
        """Pixels, before resizing, that a structure must have in a slice."""
        if pictures.pixel_spacing is None:
            return self._options.min_pixels
        return max(self._options.min_pixels, self._options.min_area_mm2 / float(np.prod(pictures.pixel_spacing)))

    def _sentences(self, index: int, target: Target) -> list[str]:
        number = self._options.sentences
        if target.own or not number or number >= len(target.sentences):
            return list(target.sentences)
        return self._random(f"{index}:{target.name}").sample(target.sentences, number)

    def _add_negatives(
        self,
        pictures: Slices,
        found: dict[int, list[Target]],
        absent: dict[int, list[Target]],
        rows: dict[int, list[list[Any]]],
    ) -> None:
        random_ = self._random("negatives")
        chosen: list[tuple[int, Target]] = []
        empty = {index for index in found if not found[index]}
        if self._options.empty_slices:
            chosen += [(index, random_.choice(absent[index])) for index in sorted(empty) if absent[index]]
        if share := self._options.negatives:
            shows = [index for index in absent if index not in empty] or list(absent)
            candidates = [(index, target) for index in shows for target in absent[index]]
            wanted = share * max(1, sum(map(len, rows.values())))
            # 2-D images have few rows each: 0.25 of one row is a row in every fourth image.
            number = int(wanted) + (random_.random() < wanted % 1)
            drawn = random_.sample(candidates, min(number, len(candidates)))
            taken = {(index, target.name) for index, target in chosen}
            chosen += sorted((one for one in drawn if (one[0], one[1].name) not in taken), key=lambda one: one[0])
        for index, target in chosen:
            path = self._folder / "masks" / self._name / "empty.png"
            if not path.exists():
                shape = target_shape(pictures.labels(index, 0).shape, self._options.size)
                self._save(path, np.zeros(shape, np.uint8))
            text = random_.choice(target.negatives)
            rows[index] += self._rows(pictures, index, target, path, [text], "no-")
            self._result.negatives += 1

    def _rows(
        self, pictures: Slices, index: int, target: Target, mask: Path, sentences: Iterable[str], prefix: str = ""
    ) -> list[list[Any]]:
        image = self._path("images", pictures, index)
        part = f"_{pictures.axis}_{index:04d}" if pictures.axis else ""
        case = f"{self._name}{part}_{prefix}{self._files[target.name]}"
        shape = pictures.labels(index, 0).shape
        scale = [full / small for full, small in zip(shape, target_shape(shape, self._options.size))]
        spacing = (
            [_number(mm * by) for mm, by in zip(pictures.pixel_spacing, scale)] if pictures.pixel_spacing else ["", ""]
        )
        place = [self._name, pictures.axis, index, _number(pictures.slice_mm)] if pictures.axis else ["", "", "", ""]
        return [
            [
                image.relative_to(self._folder).as_posix(), mask.relative_to(self._folder).as_posix(),
                " ".join(text.split()), self._split, self._case.subject, case if number == 1 else f"{case}_{number}",
                target.name, pictures.modality, *place, *spacing, pictures.window,
            ]
            for number, text in enumerate(sentences, start=1)
        ]  # fmt: skip

    def _path(self, kind: str, pictures: Slices, index: int, structure: str = "") -> Path:
        if pictures.axis is None:
            return self._folder / kind / (f"{self._name}/{structure}.png" if structure else f"{self._name}.png")
        name = f"{pictures.axis}_{index:04d}{structure and '_'}{structure}.png"
        return self._folder / kind / self._name / name

    def _save(self, path: Path, pixels: np.ndarray) -> None:
        if path.parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, compress_level=_COMPRESSION)

    def _random(self, what: str) -> random.Random:
        # By name, so that a case has its sentences whichever cases are imported with it.
        return random.Random(f"{self._options.seed}:{self._case.name}:{what}")


class _Present:
    """Which labels a picture shows, found once for all structures."""

    def __init__(self, pictures: Slices, index: int) -> None:
        self._pictures, self._index = pictures, index
        self._layers: dict[int, tuple[np.ndarray, dict[int, int]]] = {}

    def _layer(self, layer: int) -> tuple[np.ndarray, dict[int, int]]:
        if layer not in self._layers:
            labels = self._pictures.labels(self._index, layer)
            if labels.dtype.itemsize == 1:
                counts = np.bincount(labels.astype(np.uint8, copy=False).ravel(), minlength=256)
                values = np.flatnonzero(counts)
                counted = dict(zip(values.tolist(), counts[values].tolist()))
            else:
                values, counts = np.unique(labels, return_counts=True)
                counted = dict(zip(values.tolist(), counts.tolist()))
            self._layers[layer] = labels, counted
        return self._layers[layer]

    def area(self, parts: Sequence[tuple[int, int]]) -> int:
        """Pixels of a structure; parts of several layers may lie on each other."""
        if len({layer for layer, _ in parts}) > 1:
            return int(np.count_nonzero(self.mask(parts)))
        return sum(self._layer(layer)[1].get(value, 0) for layer, value in parts)

    def mask(self, parts: Sequence[tuple[int, int]]) -> np.ndarray:
        """bool [H, W]."""
        mask = np.zeros(self._layer(parts[0][0])[0].shape, bool)
        for layer in {layer for layer, _ in parts}:
            labels, counted = self._layer(layer)
            values = [value for other, value in parts if other == layer and value in counted]
            mask |= labels == values[0] if len(values) == 1 else np.isin(labels, values)
        return mask


def distinct_names(names: Sequence[str]) -> list[str]:
    """A name for a file for each of `names`, distinct in every file system."""
    taken: set[str] = set()
    result = []
    for name in map(file_name, names):
        candidate, number = name, 1
        while name_key(candidate) in taken:
            number += 1
            candidate = f"{name}-{number}"
        taken.add(name_key(candidate))
        result.append(candidate)
    return result


def file_name(name: str) -> str:
    """`name` in letters, digits, "-", "_" and ".", not too long."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-_")[:_NAME_LENGTH] or "unnamed"


def _merged(lists: Iterable[tuple[Structure, ...]]) -> list[Structure]:
    # Cases share their list: a thousand cases of a hundred structures are not gone through one by one.
    distinct = {id(structures): structures for structures in lists}.values()
    return list({structure.name: structure for structures in distinct for structure in structures}.values())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _check_result(result: Imported) -> None:
    if result.rows.total():
        return
    if result.skipped:
        raise ValueError(f"source must hold a case that can be read, got none; the first: {result.skipped[0]}")
    small = f" ({result.small} have too few pixels: --min-pixels, --min-area-mm2)" if result.small else ""
    raise ValueError(f"source must show a structure that is asked for in some slice, got none{small}")
