"""What a folder of DICOM, NIfTI, NRRD or MetaImage files holds, before it is made a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ntpseg.volumes.contents import kind_of
from ntpseg.volumes.dicom_headers import Plane, read_planes
from ntpseg.volumes.dicom_series import dicom_files, series_of
from ntpseg.volumes.dicom_stack import stack
from ntpseg.volumes.geometry import Geometry
from ntpseg.volumes.privacy import burnt_in_warning, path_warnings
from ntpseg.volumes.volume import Header
from ntpseg.volumes.windows import parse_window, render, window_text

if TYPE_CHECKING:
    from rich.table import Table

_NAMED = {"dicom": "DICOM", "nifti": "NIfTI", "nrrd": "NRRD", "metaimage": "MetaImage"}


@dataclass(frozen=True, slots=True)
class Group:
    """Volumes of one format, modality and orientation.

    Attributes:
        source: format.
        modality: DICOM's code; "" where unknown.
        orientation: of the file's axes, as `Geometry.orientation`; "" where the file does not say.
        volumes: number of series or volumes; `slices` of all of them.
        sizes: (smallest, largest) number of slices, rows and columns.
        spacing: (smallest, largest) millimetres along slice, row and column; None where none is known.
        windows: what "auto" would display it with, the most frequent first.
        notes: what is odd, with the number of volumes.
    """

    source: str
    modality: str
    orientation: str
    volumes: int
    slices: int
    sizes: tuple[tuple[int, int, int], tuple[int, int, int]]
    spacing: tuple[tuple[float, float, float], tuple[float, float, float]] | None
    windows: tuple[str, ...]
    notes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Overview:
    """What `survey` found.

    Attributes:
        groups: the volumes that can be read.
        faults: one line for each file or series that cannot be read.
        privacy: warnings and the number of files or series each holds for.
    """

    groups: tuple[Group, ...] = ()
    faults: tuple[str, ...] = ()
    privacy: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Seen:
    geometry: Geometry
    header: Header
    window: str


@dataclass(slots=True)
class _Found:
    seen: list[_Seen] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    privacy: Counter[str] = field(default_factory=Counter)


def holds_raw(path: str | PathLike[str]) -> bool:
    """Whether a path is a file, or a folder with a file, that `survey` describes; stops at the first."""
    path = Path(path)
    return any(kind_of(file) for file in dicom_files(path)) if path.exists() else False


def survey(path: str | PathLike[str]) -> Overview:
    """Describe every volume at a path; DICOM by its headers alone, the others are read.

    Args:
        path: a file, or a folder; the folders inside are searched too.

    Raises:
        FileNotFoundError: no such file or folder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} must be a folder or a volume, got none of that name")
    found = _Found()
    planes: list[Plane] = []
    for file in dicom_files(path):
        kind = kind_of(file)
        if kind is None:
            continue
        # The folder that the user names is part of every message anyway, but its name counts as well.
        parts = (path.name, *file.relative_to(path).parts) if path.is_dir() else (file.name,)
        try:
            found.privacy.update(path_warnings(file, parts))
            if kind == "dicom":
                planes += read_planes(file)
            else:
                found.seen.append(_read(file))
        except (ValueError, OSError) as error:
            found.faults.append(_line(error))
    for info in series_of(planes):
        first = info.planes[0]
        found.privacy.update(filter(None, [burnt_in_warning(first.modality, _burnt_in(info.planes))]))
        try:
            found.seen.append(_stacked(first.path if path.is_file() else path, info.planes, info.notes))
        except ValueError as error:
            found.faults.append(f"series {info.name}: {_line(error)}")
    return Overview(_grouped(found.seen), tuple(found.faults), tuple(found.privacy.most_common()))


def overview_table(overview: Overview, title: str) -> Table:
    """The groups as a table for a console."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for name in ("format", "modality", "volumes", "slices", "size (slices, rows, columns)"):
        table.add_column(name)
    for name in ("spacing in mm (the same)", "orientation", "window (auto)", "odd"):
        table.add_column(name)
    for group in overview.groups:
        cells = (
            _NAMED.get(group.source, group.source),
            group.modality or "unknown",
            str(group.volumes),
            str(group.slices),
            _range(group.sizes),
            _range(group.spacing) if group.spacing else "unknown",
            group.orientation or "unknown",
            ", ".join(group.windows[:3]) + (f" and {len(group.windows) - 3} more" if len(group.windows) > 3 else ""),
            "\n".join(f"{note} ({count}x)" for note, count in group.notes),
        )
        table.add_row(*map(Text, cells))
    return table


def _read(file: Path) -> _Seen:
    from ntpseg.volumes.reading import read_volume

    try:
        volume = read_volume(file)
    except ValueError as error:
        if "4-D file" not in str(error):
            raise
        volume = read_volume(file, series="0")
        notes = (*volume.header.notes, "a 4-D file; its first volume is described")
        volume = replace(volume, header=replace(volume.header, notes=notes))
    return _Seen(volume.stored, volume.header, render(volume, parse_window("auto")).window or "as stored")


def _stacked(path: Path, members: tuple[Plane, ...], notes: tuple[str, ...]) -> _Seen:
    planes, affine, known, more = stack(path, members)
    middle = planes[len(planes) // 2]
    header = Header(
        source="dicom",
        modality=middle.modality,
        windows=middle.windows,
        spacing_known=known,
        notes=tuple(dict.fromkeys((*notes, *middle.notes, *more))),
    )
    placed = middle.position is not None and middle.orientation is not None
    geometry = Geometry((len(planes), *middle.size), affine)
    if not placed:
        header = replace(header, notes=(*header.notes, "the header does not say how it lies in the patient"))
    return _Seen(geometry, header, _auto(middle))


def _auto(plane: Plane) -> str:
    """What "auto" becomes, without a look at the pixels."""
    if plane.colour:
        return "as stored"
    if plane.windows and plane.modality != "MR":
        return window_text(*plane.windows[0])
    return "soft-tissue" if plane.modality == "CT" else "percentile"


def _burnt_in(planes: Iterable[Plane]) -> bool | None:
    answers = {plane.burnt_in for plane in planes}
    return True if True in answers else None if None in answers else False


def _grouped(seen: list[_Seen]) -> tuple[Group, ...]:
    parts: dict[tuple[str, str, str], list[_Seen]] = {}
    for one in seen:
        unplaced = any("how it lies" in note for note in one.header.notes)
        orientation = "" if unplaced else one.geometry.orientation
        parts.setdefault((one.header.source, one.header.modality, orientation), []).append(one)
    groups = []
    for (source, modality, orientation), members in sorted(parts.items()):
        shapes = list(zip(*(one.geometry.shape for one in members)))
        known = list(zip(*(one.geometry.spacing for one in members if one.header.spacing_known)))
        windows = Counter(one.window for one in members)
        notes = Counter(note for one in members for note in one.header.notes)
        groups.append(
            Group(
                source=source,
                modality=modality,
                orientation=orientation,
                volumes=len(members),
                slices=sum(shapes[0]),
                sizes=(
                    (min(shapes[0]), min(shapes[1]), min(shapes[2])),
                    (max(shapes[0]), max(shapes[1]), max(shapes[2])),
                ),
                spacing=(
                    ((min(known[0]), min(known[1]), min(known[2])), (max(known[0]), max(known[1]), max(known[2])))
                    if known
                    else None
                ),
                windows=tuple(window for window, _ in windows.most_common()),
                notes=tuple(notes.most_common()),
            )
        )
    return tuple(groups)


def _range(bounds: tuple[tuple[float, ...], tuple[float, ...]]) -> str:
    return " x ".join(
        f"{a:g}" if f"{a:g}" == f"{b:g}" else f"{a:g}..{b:g}"
        for a, b in zip(*((tuple(map(_short, side))) for side in bounds))
    )


def _short(number: float) -> float:
    return round(number, 3)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
