"""DICOM series: which files and frames belong together, and which of several series is meant."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ntpseg.utils.checks import brief
from ntpseg.volumes.dicom_headers import Plane, read_planes

# Slices of another direction or size that a series of at least so many slices may hold: scout views.
_SCOUTS, _MANY = 3, 10
_SAME_DIRECTION = 2e-3


@dataclass(frozen=True, slots=True)
class SeriesInfo:
    """One series, or one phase of a series, without anything that tells whose it is.

    Attributes:
        name: what ``series=`` takes: the series' number, with a count behind it ("3-1", "3-2") where several share it.
        modality: DICOM's code; "" where the file does not say.
        slices: number of slices, or frames.
        size: rows and columns.
        planes: its slices, not in order.
        notes: what was left out of it.
    """

    name: str
    modality: str
    slices: int
    size: tuple[int, int]
    planes: tuple[Plane, ...]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Plane, ...]:
        """The first of its slices in each file."""
        return tuple({plane.path: plane for plane in reversed(self.planes)}.values())[::-1]

    def __str__(self) -> str:
        rows, columns = self.size
        noun = "slice" if self.slices == 1 else "slices"
        return f"{self.name}: {self.slices} {noun} of {columns}x{rows}, {self.modality or 'modality unknown'}"


def list_series(path: str | os.PathLike[str]) -> list[SeriesInfo]:
    """The series of a folder and the folders inside, or of a file, in the order of their numbers.

    Files that are not DICOM images are passed over, and so are scout views beside other series. A series with several
    slices at one place (phases, echoes, b-values) is listed as so many.

    Raises:
        ValueError: pydicom is not installed, or a header is damaged.
    """
    return series_of(plane for file in dicom_files(Path(path)) for plane in read_planes(file))


def series_of(planes: Iterable[Plane]) -> list[SeriesInfo]:
    """The series that slices make up, see `list_series`."""
    groups: dict[tuple[str, str], list[Plane]] = {}
    for plane in planes:
        # A multi-frame file is a volume of its own.
        groups.setdefault((plane.series, str(plane.path) if plane.frames > 1 else ""), []).append(plane)
    found: list[tuple[Sequence[Plane], tuple[str, ...]]] = []
    for members in groups.values():
        once, notes = _once(members)
        parts = [phase for part in _alike(once) for phase in _phases(part)]
        kept = _without_scouts(parts)
        aside = sum(map(len, parts)) - sum(map(len, kept))
        if aside:
            notes = (*notes, f"{aside} of {len(once)} slices have another direction or size (scout views): left out")
        found += [(part, notes) for part in kept]
    found = [entry for entry in found if not entry[0][0].localizer] or found
    found.sort(key=lambda entry: (_number(entry[0]), entry[0][0].series, min(str(plane.path) for plane in entry[0])))
    numbers = [_number(part) for part, _ in found]
    series = []
    for place, (part, notes) in enumerate(found):
        number = numbers[place]
        name = str(number) if numbers.count(number) == 1 else f"{number}-{numbers[:place].count(number) + 1}"
        series.append(SeriesInfo(name, part[0].modality, len(part), part[0].size, tuple(part), notes))
    return series


def choose_series(path: Path, name: str | None) -> SeriesInfo:
    """The only series of a folder or file, or the one that is named.

    Args:
        path: a folder, or a file.
        name: `SeriesInfo.name`, or the end of the SeriesInstanceUID.

    Raises:
        ValueError: there is none, or several and none of them is named; the message lists them.
    """
    series = list_series(path)
    if not series:
        raise ValueError(f"{path} must hold a DICOM image, got none")
    listed = "; ".join(map(str, series[:20])) + (f"; and {len(series) - 20} more" if len(series) > 20 else "")
    if name is not None:
        wanted = str(name).strip()
        chosen = [info for info in series if info.name == wanted]
        if not chosen and len(wanted) >= 4:
            chosen = [info for info in series if info.planes[0].series.endswith(wanted)]
        if len(chosen) != 1:
            raise ValueError(f"series must be one of those in {path}, got {brief(name)}; there are {listed}")
        return chosen[0]
    if len(series) > 1:
        raise ValueError(f"{path} must hold one series, got {len(series)}; choose one with series, of {listed}")
    return series[0]


def dicom_files(path: Path) -> Iterator[Path]:
    """The files below a folder that may hold images, or the file itself; no DICOMDIR, nothing hidden."""
    if path.is_file():
        yield path
        return
    for place, folders, names in os.walk(path):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for name in sorted(names):
            file = Path(place, name)
            if not name.startswith(".") and name.upper() != "DICOMDIR" and file.is_file():
                yield file


def _once(planes: Sequence[Plane]) -> tuple[list[Plane], tuple[str, ...]]:
    """Slices without those that are there twice as the same object."""
    # Some anonymisers give all slices one instance.
    seen: dict[tuple[str, int, object], Plane] = {}
    for plane in planes:
        seen.setdefault((plane.instance or str(plane.path), plane.frame, plane.position), plane)
    copies = len(planes) - len(seen)
    noun = "slice is" if copies == 1 else "slices are"
    return list(seen.values()), (f"{copies} {noun} there twice and read once",) if copies else ()


def _alike(planes: Sequence[Plane]) -> list[list[Plane]]:
    """Slices of one size and direction each, scout views apart."""
    parts: list[list[Plane]] = []
    for plane in planes:
        for part in parts:
            first = part[0]
            same = (first.size, first.localizer, first.colour) == (plane.size, plane.localizer, plane.colour)
            if same and _parallel(first.orientation, plane.orientation):
                part.append(plane)
                break
        else:
            parts.append([plane])
    return parts


def _parallel(first: Sequence[float] | None, second: Sequence[float] | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool(np.abs(np.subtract(first, second)).max() < _SAME_DIRECTION)


def _without_scouts(parts: list[list[Plane]]) -> list[list[Plane]]:
    kept = [part for part in parts if not part[0].localizer] or parts
    if max(map(len, kept)) >= _MANY:
        kept = [part for part in kept if len(part) > _SCOUTS]
    return kept


def _phases(planes: list[Plane]) -> list[list[Plane]]:
    """Split slices that lie at the same places by what their headers say differs; unsplit where nothing does."""
    if _unique(planes):
        return [planes]
    tags = len(planes[0].phase)
    for places in [(tag,) for tag in range(tags)] + [tuple(range(tags))]:
        parts: dict[tuple[str, ...], list[Plane]] = {}
        for plane in planes:
            parts.setdefault(tuple(plane.phase[place] for place in places), []).append(plane)
        if len(parts) > 1 and all(map(_unique, parts.values())) and len({len(part) for part in parts.values()}) == 1:
            return list(parts.values())
    return [planes]


def _unique(planes: Sequence[Plane]) -> bool:
    positions = [tuple(round(v, 2) for v in plane.position) for plane in planes if plane.position is not None]
    return len(set(positions)) == len(positions)


def _number(planes: Sequence[Plane]) -> int:
    return planes[0].number if planes[0].number is not None else 0
