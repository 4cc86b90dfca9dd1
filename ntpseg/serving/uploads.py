"""From an uploaded form to a `StoredImage`: files are written into a private folder, read, and removed again."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from ntpseg.data import read_image
from ntpseg.serving.archives import UploadFolder
from ntpseg.serving.declared import check_declared
from ntpseg.serving.images import StoredImage
from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused, user_line
from ntpseg.volumes.contents import kind_of
from ntpseg.volumes.nifti import open_nifti
from ntpseg.volumes.reading import list_series, read_volume

# Of a 4-D file: an answer lists them all.
MAX_SERIES = 1000
ENDINGS = {"dicom": ".dcm", "nifti": ".nii", "nrrd": ".nrrd", "metaimage": ".mha"}


def open_upload(
    files: Sequence[tuple[str, IO[bytes]]], options: ServerOptions, series: str | None = None
) -> StoredImage:
    """Read a picture, a volume's file, or the files of one DICOM series.

    Args:
        files: name and content of each; of a name only the ending is looked at.
        options: limits.
        series: which of several series, or of the volumes of a 4-D NIfTI.

    Raises:
        Refused: nothing that can be read, more than the limits, or (409) several series and none is chosen.
    """
    if not files:
        raise Refused(400, "an upload must hold at least one file, got none")
    with tempfile.TemporaryDirectory(prefix="ntpseg-upload-") as name:
        folder = Path(name).resolve()
        upload = UploadFolder(folder, options)
        try:
            for file_name, content in files:
                upload.add(file_name, content)
            if not upload.files:
                raise Refused(400, "the archive must hold an image, got no file")
            own = [_named(file) for file in upload.files]
            check_declared(own, options)
            return _read(own, folder, series)
        except ValueError as error:
            raise Refused(400, user_line(error, folder)) from error


def _named(file: Path) -> Path:
    """The file under the ending of its content: SimpleITK and nibabel go by it, and what users say may be wrong."""
    kind = kind_of(file)
    return file if kind is None else file.rename(file.with_suffix(ENDINGS[kind]))


def _read(files: Sequence[Path], folder: Path, series: str | None) -> StoredImage:
    kinds = [kind_of(file) for file in files]
    if len(files) == 1 and kinds[0] is None:
        return StoredImage(picture=read_image(files[0]))
    if len(files) > 1:
        if "dicom" not in kinds:
            raise Refused(400, "several files must be the DICOM files of one series, got none; drop one file alone")
        # What lies beside the slices of a series: a viewer's page, a picture, a table.
        for file, kind in zip(files, kinds):
            if kind != "dicom":
                file.unlink()
    whole = folder if len(files) > 1 else files[0]
    known = _series(whole, kinds[0])
    if len(known) > 1 and series is None:
        raise Refused(409, f"an upload must hold one series, got {len(known)}; choose one", series=known)
    volume = read_volume(whole, series=series if len(known) > 1 else None)
    # The file behind a mapped array is about to be removed, and a view of a larger array would keep all of that.
    return StoredImage(volume=replace(volume, voxels=np.array(volume.voxels)))


def _series(path: Path, kind: str | None) -> list[tuple[str, str]]:
    """Name and description of each series of a folder, and of each volume of a 4-D NIfTI."""
    if path.is_dir():
        return [(one.name, str(one)) for one in list_series(path)]
    if kind == "nifti":
        count = math.prod(open_nifti(path).shape[3:])
        if count > MAX_SERIES:
            raise Refused(413, f"a file must hold at most {MAX_SERIES:,} volumes, got {count:,}")
        return [(str(number), f"volume {number + 1}") for number in range(count)]
    return []
