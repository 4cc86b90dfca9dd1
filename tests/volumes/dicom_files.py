"""DICOM files of a synthetic patient, for the tests of reading and writing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

# What must never leave the file, except into a DICOM-SEG object, which belongs to the same patient and study.
PATIENT_NAME, PATIENT_ID = "Doe^Jane", "MRN-4711"
INTERCEPT = -1024


def ct_slices(voxels: np.ndarray, affine: np.ndarray, *, description: str = "thorax") -> list[FileDataset]:
    """The slices of one CT series, in the order of the array.

    Args:
        voxels: Hounsfield units ``[D, H, W]``, integers of at least -1024.
        affine: ``[4, 4]`` from ``(i, j, k, 1)`` to millimetres, LPS; i and j perpendicular.
        description: the series' description.
    """
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    column_mm, row_mm, slice_mm = np.linalg.norm(affine[:3, :3], axis=0)
    datasets = []
    for k, plane in enumerate(voxels):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        slice_ = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = study, series, frame
        _describe(slice_, description)
        slice_.InstanceNumber = k + 1
        slice_.ImageOrientationPatient = [
            *_decimal(affine[:3, 0] / column_mm),
            *_decimal(affine[:3, 1] / row_mm),
        ]
        slice_.ImagePositionPatient = _decimal(affine[:3, 3] + k * affine[:3, 2])
        slice_.PixelSpacing = _decimal([row_mm, column_mm])
        slice_.SliceThickness = f"{slice_mm:.10g}"
        slice_.Rows, slice_.Columns = plane.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.RescaleSlope, slice_.RescaleIntercept, slice_.RescaleType = 1, INTERCEPT, "HU"
        slice_.WindowCenter, slice_.WindowWidth = 40, 400
        slice_.PixelData = (plane.astype(np.int32) - INTERCEPT).astype("<i2").tobytes()
        datasets.append(slice_)
    return datasets


def write_series(
    folder: Path, voxels: np.ndarray, affine: np.ndarray, *, description: str = "thorax", seed: int = 0
) -> Path:
    """Write `ct_slices` to files whose names do not tell their order; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    slices = ct_slices(voxels, affine, description=description)
    order = np.random.default_rng(seed).permutation(len(slices))
    for name, k in enumerate(order):
        slices[k].save_as(folder / f"{description}-{name:04d}.dcm", enforce_file_format=True)
    return folder


def write_multiframe(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """Write the CT as one file with a frame for each slice (Legacy Converted Enhanced CT)."""
    from highdicom.legacy import LegacyConvertedEnhancedCTImage

    slices = ct_slices(voxels, affine)
    converted = LegacyConvertedEnhancedCTImage(
        slices, series_instance_uid=generate_uid(), series_number=2, sop_instance_uid=generate_uid(), instance_number=1
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    converted.save_as(path, enforce_file_format=True)
    return path


def _describe(dataset: Dataset, description: str) -> None:
    dataset.PatientName, dataset.PatientID = PATIENT_NAME, PATIENT_ID
    dataset.PatientBirthDate, dataset.PatientSex = "19700101", "F"
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200101", "120000", "1"
    dataset.AccessionNumber, dataset.ReferringPhysicianName = "A-1", "House^Gregory"
    dataset.SeriesNumber, dataset.SeriesDescription, dataset.Modality = 1, description, "CT"
    dataset.BodyPartExamined, dataset.PatientPosition = "CHEST", "HFS"
    dataset.Manufacturer, dataset.FrameOfReferenceUID = "ACME", dataset.FrameOfReferenceUID
    dataset.PositionReferenceIndicator, dataset.Laterality = "", None
    dataset.ImageType, dataset.AcquisitionNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], 1
    dataset.KVP, dataset.ContentDate, dataset.ContentTime = 120, "20200101", "120000"


def _decimal(numbers: object) -> list[str]:
    """DICOM's decimal strings, of 16 characters at most."""
    return [f"{number:.9g}"[:16] for number in np.asarray(numbers, dtype=np.float64).tolist()]
