"""A tiny CT series; its patient's name must appear nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from serving_files import squares


def write_series(folder: Path, number: int, slices: int = 4) -> list[Path]:
    """Slices of 40 x 56 pixels of 2 x 1 mm, 5 mm apart."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir()
    study, series, files = generate_uid(), generate_uid(), []
    for index in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"SECRET^NAME-{number}-{index}.dcm"
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, study
        ds.PatientName, ds.PatientID, ds.Modality = "SECRET^NAME", "SECRET-1", "CT"
        ds.SeriesNumber, ds.InstanceNumber = number, index + 1
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 5.0 * index], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [2.0, 1.0], 5.0
        ds.Rows, ds.Columns, ds.SamplesPerPixel = 40, 56, 1
        ds.PhotometricInterpretation, ds.PixelRepresentation = "MONOCHROME2", 1
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.RescaleSlope, ds.RescaleIntercept = 1, 0
        ds.PixelData = squares().astype(np.int16).tobytes()
        ds.save_as(path, enforce_file_format=True)
        files.append(path)
    return files
