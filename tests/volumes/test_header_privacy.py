"""Nothing of a DICOM header that tells whose image it is leaves the reader."""

from __future__ import annotations

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
from pydicom.datadict import DicomDictionary  # noqa: E402
from test_dicom import dataset, save  # noqa: E402

from ntpseg.volumes import list_series, read_volume  # noqa: E402

SENTINEL = "SENTINEL7"
TEXT = ("PN", "LO", "SH", "LT", "ST", "UT", "UC", "AE")


def test_no_text_of_the_header_is_kept(tmp_path, caplog, recwarn):
    for index in range(2):
        file = dataset(np.full((4, 4), index, np.uint16), ImagePositionPatient=[0, 0, float(index)])
        for tag, (kind, *_) in DicomDictionary.items():
            if kind in TEXT and 0x00080000 <= tag < 0x00280000:
                file.add_new(tag, kind, SENTINEL)
        file.BodyPartExamined, file.SeriesInstanceUID = SENTINEL, "1.2.3.777777"
        save(file, tmp_path / str(index))
    assert SENTINEL.encode() in (tmp_path / "0").read_bytes()
    # pydicom warns of such values where this test sets them; reading must not.
    caplog.clear()
    recwarn.clear()
    volume, series = read_volume(tmp_path), list_series(tmp_path)
    with pytest.raises(ValueError) as error:
        read_volume(tmp_path, series="9")
    told = [volume.header, series, *map(str, series), error.value, caplog.text, *(entry.message for entry in recwarn)]
    assert volume.header.modality == "CT" and SENTINEL.lower() not in " ".join(map(str, told)).lower()
    assert "777777" not in " ".join([str(volume.header), *map(str, series), str(error.value)])


def test_only_terms_of_the_standard_are_kept(tmp_path):
    for modality, part, kept in (
        ("CT", "CHEST", ("CT", "chest")),
        ("DOE", "DOE JANE", ("", "")),
        ("mr ", "Liver", ("MR", "liver")),
    ):
        file = dataset(np.zeros((4, 4), np.int16), Modality=modality)
        file.BodyPartExamined = part
        save(file, tmp_path / "a")
        header = read_volume(tmp_path / "a").header
        assert (header.modality, header.body_part) == kept
