"""What a file says of its size and of other files, looked at before anything of it is decoded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ntpseg.data.pixels import FORMATS
from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused
from ntpseg.volumes.contents import kind_of
from ntpseg.volumes.extras import require
from ntpseg.volumes.nifti import open_nifti

# A header of MetaImage or NRRD is text of a few hundred bytes.
HEADER = 2**16


def check_declared(files: Sequence[Path], options: ServerOptions) -> None:
    """Refuse files that would become larger than the limits, or that point to data in another file.

    Raises:
        Refused: see above.
        ValueError: a header that cannot be read.
    """
    voxels = 0
    for path in files:
        kind = kind_of(path)
        if kind == "dicom":
            voxels += _dicom(path, options)
        elif kind == "nifti":
            voxels += math.prod(open_nifti(path).shape)
        elif kind in ("nrrd", "metaimage"):
            _refuse_other_file(path, kind)
            voxels += _itk(path)
        else:
            _picture(path, options)
        if voxels > options.max_voxels:
            raise Refused(413, f"a volume must have at most {options.max_voxels:,} voxels, got more; cut it")


def _dicom(path: Path, options: ServerOptions) -> int:
    pydicom = require("pydicom", "medical", "reading DICOM")
    try:
        syntax = pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID")
        if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
            # Its header inflates with the rest, to any size.
            raise Refused(400, "the file must not be deflated DICOM; save it with another transfer syntax")
        tags = ["Rows", "Columns", "NumberOfFrames"]
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)
        size = (header.get("Rows"), header.get("Columns"), header.get("NumberOfFrames"))
        numbers = [int(number or 1) for number in size]
    except Refused:
        raise
    except Exception as error:  # pydicom raises anything on a damaged header
        raise ValueError("the file must be readable DICOM, got a damaged header; copy it again") from error
    if min(numbers) < 1:
        raise ValueError("the file must be readable DICOM, got a negative size; copy it again")
    # Each frame is read as a slice of its own.
    if numbers[2] > options.max_files:
        raise Refused(413, f"a file must have at most {options.max_files:,} frames, got more; cut it")
    return math.prod(numbers)


def _itk(path: Path) -> int:
    reader = require("SimpleITK", "medical", "reading NRRD and MetaImage").ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError("the file must be a readable NRRD or MetaImage, got a damaged one; copy it again") from error
    return math.prod(reader.GetSize()) * reader.GetNumberOfComponents()


def _refuse_other_file(path: Path, kind: str) -> None:
    """NRRD and MetaImage may keep their voxels in another file: the readers would follow its name anywhere."""
    with path.open("rb") as file:
        header = file.read(HEADER)
    if kind == "nrrd":
        end = re.search(rb"\r?\n\r?\n", header)
        inside = end is not None and not re.search(rb"data\s*file\s*:", header[: end.start()], re.IGNORECASE)
    else:
        # The first one counts, and it ends the header.
        start = re.search(rb"elementdatafile", header, re.IGNORECASE)
        inside = start is not None and bool(re.match(rb"ElementDataFile *= *LOCAL *\r?\n", header[start.start() :]))
    if not inside:
        raise Refused(400, "the file must hold its own voxels, got a header that names another file")


def _picture(path: Path, options: ServerOptions) -> None:
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # the reader tells what it is instead
    if width * height > options.max_pixels:
        raise Refused(413, f"a picture must have at most {options.max_pixels:,} pixels, got {width}x{height}; cut it")
