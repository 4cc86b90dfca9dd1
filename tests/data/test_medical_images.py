"""DICOM and NIfTI files of one picture are images and masks like any other; a volume is none."""

from __future__ import annotations

import numpy as np
import pytest

from ntpseg.data.images import read_image, read_windowed
from ntpseg.data.masks import read_mask
from ntpseg.data.records import case_of

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")


def xray(path, pixels: np.ndarray, **tags) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    values = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1",
        "SOPInstanceUID": "1.2.3",
        "PatientName": "SENTINEL^NAME",
        "Modality": "DX",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "PixelData": pixels.astype(np.uint16).tobytes(),
        **tags,
    }
    for name, value in values.items():
        setattr(file, name, value)
    pydicom.dcmwrite(path, file, enforce_file_format=True)


def test_xray_by_its_headers_window(tmp_path):
    xray(tmp_path / "noextension", np.array([[0, 1000], [2000, 4000]]), WindowCenter=1000.5, WindowWidth=2001)
    image, window = read_windowed(tmp_path / "noextension")
    assert image.tolist() == [[0, 128], [255, 255]] and window is not None and str(window) == "0..2000"


def test_monochrome1_is_inverted_but_a_mask_is_not(tmp_path):
    xray(tmp_path / "a.dcm", np.array([[0, 4000]]), PhotometricInterpretation="MONOCHROME1")
    assert read_image(tmp_path / "a.dcm").tolist() == [[255, 0]]
    pixels = np.zeros((4, 4))
    pixels[0] = 1
    xray(tmp_path / "mask.dcm", pixels)
    assert read_mask(tmp_path / "mask.dcm").sum() == 4
    assert case_of("mask_a.dcm") == case_of("a.nii.gz") == "a"


def test_flat_nifti_is_an_image_and_a_volume_is_not(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    nibabel.Nifti1Image(pixels.T, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    assert (read_image(tmp_path / "a.nii.gz") == pixels).all()
    nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_filename(tmp_path / "v.nii")
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=r"v\.nii must be a 2-D image, got a volume; .*ntpseg data import"):
            read(tmp_path / "v.nii")
