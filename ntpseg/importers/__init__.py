"""Importers: what hospitals and public sets have, sliced once into PNG images and masks with a ``manifest.csv``.

To add one, write a module with ``read(source, options) -> list[Case]`` (see `ntpseg.importers.base`) and list it here.
This module and `ntpseg.importers.options` import nothing heavy: the program names every importer in its help.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ntpseg.importers.options import ImportOptions
from ntpseg.utils.checks import check_choice

if TYPE_CHECKING:
    from ntpseg.importers.base import Case
    from ntpseg.importers.writing import Imported
    from ntpseg.utils.progress import StageCallback

__all__ = ["IMPORTERS", "ImportOptions", "Importer", "import_dataset"]


@dataclass(frozen=True, slots=True)
class Importer:
    """One kind of source.

    Attributes:
        name: KIND of ``ntpseg data import KIND SRC OUT``.
        module: defines ``read(source: Path, options: ImportOptions) -> list[Case]``.
        describe: what the source is, for help texts.
        reads: fields of `ImportOptions` that it reads beside those that every import does.
    """

    name: str
    module: str
    describe: str
    reads: tuple[str, ...] = ()

    def read(self, source: Path, options: ImportOptions) -> list[Case]:
        """List the cases of `source`, opening no image of it."""
        read: Callable[[Path, ImportOptions], list[Case]] = importlib.import_module(self.module).read
        return read(source, options)


# What every import reads: what is written is the same for all.
_ALWAYS = (
    *("size", "min_pixels", "negatives", "empty_slices", "sentences", "templates", "structures", "splits", "seed"),
    "skip_bad",
)
_VOLUMES = ("axis", "window", "min_area_mm2")
_LABELS = (*_VOLUMES, "resample")
_IMPORTERS = (
    Importer(
        "nnunet",
        "ntpseg.importers.nnunet",
        "nnU-Net's dataset.json (v1, v2) with imagesTr and labelsTr",
        (*_LABELS, "channels"),
    ),
    Importer(
        "monai",
        "ntpseg.importers.monai_list",
        "MONAI's data list (JSON with training, validation, test)",
        (*_LABELS, "names", "channels"),
    ),
    Importer(
        "folders",
        "ntpseg.importers.folders",
        "a folder images and a folder labels, and a file of the names",
        (*_LABELS, "names"),
    ),
    Importer(
        "totalsegmentator",
        "ntpseg.importers.totalsegmentator",
        "a folder a case with ct.nii.gz and segmentations",
        _LABELS,
    ),
    Importer("slicer", "ntpseg.importers.slicer", "3D Slicer's *.seg.nrrd beside their volumes", _LABELS),
    Importer("dicom-seg", "ntpseg.importers.dicom_seg", "DICOM segmentation objects beside their series", _LABELS),
    Importer("rtstruct", "ntpseg.importers.rtstruct", "DICOM structure sets (RTSTRUCT) beside their series", _VOLUMES),
    Importer("coco", "ntpseg.importers.coco", "COCO JSON with polygons or RLE"),
    Importer("m3d-refseg", "ntpseg.importers.m3d_refseg", "M3D-RefSeg's folders s0000 and its tables", _LABELS),
    Importer("ms-cxr", "ntpseg.importers.ms_cxr", "MS-CXR's table or COCO file, with MIMIC-CXR-JPG"),
    Importer("boxes", "ntpseg.importers.boxes", "a table of boxes (CSV, xlsx) or COCO JSON, and images"),
)
IMPORTERS: dict[str, Importer] = {importer.name: importer for importer in _IMPORTERS}


def import_dataset(
    kind: str, source: Path, out: Path, options: ImportOptions | None = None, *, progress: StageCallback | None = None
) -> Imported:
    """Write the data set `source` as PNG images and masks with a ``manifest.csv``; all of it or nothing.

    Args:
        kind: a name of `IMPORTERS`.
        source: a file or folder, as that importer takes it.
        out: folder to make; it must not exist yet or be empty.
        options: how it is sliced, and which sentences ask for the structures.
        progress: called as ``progress("import", done, total)`` after every case.

    Returns:
        What was written, and what was left out.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: `source` or an option does not fit, the importer does not read an option, a package is missing, or
            nothing is to be asked for in the source.
    """
    from ntpseg.importers.writing import write_dataset

    check_choice("kind", kind, IMPORTERS)
    if not source.exists():
        raise FileNotFoundError(f"source must be a file or a folder, got {source}, which does not exist")
    options = options or ImportOptions()
    _check_read(IMPORTERS[kind], options)
    return write_dataset(IMPORTERS[kind].read(source, options), out, options, progress=progress)


def _check_read(importer: Importer, options: ImportOptions) -> None:
    for field in fields(ImportOptions):
        value = getattr(options, field.name)
        if field.name in (*_ALWAYS, *importer.reads) or value == field.default:
            continue
        others = ", ".join(other.name for other in _IMPORTERS if field.name in other.reads)
        shown = ",".join(value) if isinstance(value, tuple) else value
        raise ValueError(
            f"--{field.name.replace('_', '-')} must be given for a kind that reads it ({others}), got {shown} for "
            f"{importer.name}; leave it out"
        )
