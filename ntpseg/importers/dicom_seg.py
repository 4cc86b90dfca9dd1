"""DICOM segmentation objects (SEG) beside the series that they were drawn on, read with highdicom.

SRC is a folder; its files may have any names and lie in any folders. Patients become "subject-0001", ... in the order
of their files; series numbers are counted. Nothing else that a header says of them is written.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path

import numpy as np

from ntpseg.importers.alignment import aligned_labels
from ntpseg.importers.base import Case, Sample, Structure
from ntpseg.importers.dicom_files import SEGMENTATION, Series, find_series, referenced_uids, source_of
from ntpseg.importers.loading import LayerPacker
from ntpseg.importers.options import ImportOptions
from ntpseg.volumes import Header, Volume


def read(source: Path, options: ImportOptions) -> list[Case]:
    """List the segmentation objects of a folder.

    Raises:
        ValueError: a package is missing, there is none, or its series is not in the folder.
    """
    from ntpseg.volumes.extras import require

    require("highdicom", "medical", "DICOM segmentations")
    pydicom = require("pydicom", "medical", "DICOM segmentations")
    if not source.is_dir():
        raise ValueError(f"source must be a folder of DICOM series and segmentations, got the file {source}")
    series = find_series(source)
    objects = [(one, path) for one in series if one.kind == SEGMENTATION for path in one.files]
    if not objects:
        raise ValueError(f"source must hold DICOM segmentations (SEG), got {len(series)} other series in {source}")
    cases = []
    numbers: Counter[str] = Counter()
    for _, path in objects:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        referenced = referenced_uids(header)
        images = source_of(str(path), *referenced, series)
        numbers[images.subject] += 1
        name = f"{images.subject}_{numbers[images.subject]:02d}"
        load = functools.partial(_load, name, images, path, referenced[1], options.resample)
        cases.append(Case(name, images.subject, load))
    return cases


def load_series(series: Series, instances: set[str]) -> Volume:
    """The volume of an image series, which may lie among other files.

    Args:
        series: the series.
        instances: SOPInstanceUIDs that a segmentation names, of one of its phases where there are several.

    Raises:
        ValueError: no slices that make a volume, or several phases of which the segmentation names none or more.
    """
    from ntpseg.volumes.reading import list_series, read_volume

    if len(series.files) == 1:
        return read_volume(series.files[0])
    folder = Path(os.path.commonpath([path.parent for path in series.files]))
    files = set(series.files)
    # A scout view that shares the series has a name of its own.
    found = [one for one in list_series(folder) if one.slices > 1 and all(file.path in files for file in one.files)]
    if not found:
        raise ValueError(f"series in {folder} must hold slices that make a volume, got {len(files)} other files")
    if len(found) > 1:
        named = [one for one in found if any(plane.instance in instances for plane in one.planes)]
        if len(named) != 1:
            raise ValueError(
                f"a segmentation in {folder} must name the slices of one of the {len(found)} phases of its series, got "
                f"those of {len(named)}; keep only the phase that it was drawn on in the folder"
            )
        found = named
    return read_volume(folder, series=found[0].name)


def _load(name: str, images: Series, path: Path, instances: set[str], resample: bool) -> Sample:
    volume = load_series(images, instances)
    packer = LayerPacker(volume.voxels.shape[:3])
    parts: dict[str, tuple[tuple[int, int], ...]] = {}
    for segment, labels in _segments(path):
        mask = aligned_labels(name, volume, labels, resample=resample, cropped=True) > 0
        parts[segment] = (*parts.get(segment, ()), packer.add(mask))
    return Sample((volume,), tuple(packer.layers), tuple(Structure(*item) for item in parts.items()))


def _segments(path: Path):
    """Name and binary volume of one segment after the other: hundreds of them do not fit into memory together."""
    import highdicom

    try:
        segmentation = highdicom.seg.segread(path)
        for number in segmentation.segment_numbers:
            description = segmentation.get_segment_description(number)
            found = segmentation.get_volume(
                segment_numbers=[number], combine_segments=False, rescale_fractional=True, allow_missing_positions=True
            )
            array = np.asarray(found.array)
            array = array[..., 0] if array.ndim == 4 else array
            # highdicom's affine maps the array's indices (k, j, i).
            affine = found.affine[:, [2, 1, 0, 3]]
            # A fractional segmentation is foreground from one half.
            values = (array >= 0.5 if np.issubdtype(array.dtype, np.floating) else array > 0).astype(np.uint8)
            yield str(description.segment_label), Volume.from_stored(values, affine, Header("dicom"))
    except (RuntimeError, AttributeError, KeyError, IndexError, TypeError) as error:
        # The library's message may hold values of the header.
        raise ValueError(
            f"{path} must be a readable DICOM segmentation of one grid, got another ({type(error).__name__})"
        ) from error
