"""Small volumes of a synthetic patient, written as files of every kind that importers read."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

SPACING = (0.7, 0.8, 2.5)  # millimetres of i, j, k
LABELS = {"background": 0, "liver": 1, "kidney_left": 2, "tumor": 3}


def affine(origin: tuple[float, float, float] = (-10.0, 20.0, 5.0)) -> np.ndarray:
    """To millimetres, RAS as in NIfTI; stored to the patient's left, front and head."""
    matrix = np.diag([-SPACING[0], SPACING[1], SPACING[2], 1.0])
    matrix[:3, 3] = origin
    return matrix


def labels(seed: int = 0, shape: tuple[int, int, int] = (20, 18, 6)) -> np.ndarray:
    """A label map [I, J, K] as nibabel holds it: liver in slices 1 to 4, left kidney in 2 and 3, no tumour."""
    values = np.zeros(shape, np.uint8)
    values[3 : 9 + seed % 3, 4:9, 1:5] = 1
    values[12:16, 5 : 9 + seed % 2, 2:4] = 2
    return values


def image(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Hounsfield units [I, J, K]: every structure has its level."""
    noise = np.random.default_rng(seed).integers(0, 20, values.shape)
    return (noise - 100 + 80 * values).astype(np.int16)


def save_nifti(path: Path, array: np.ndarray, matrix: np.ndarray | None = None) -> Path:
    """Write an array [I, J, K] with its affine (RAS)."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, affine() if matrix is None else matrix).to_filename(path)
    return path


def save_seg_nrrd(
    path: Path, layers: list[np.ndarray], segments: list[tuple[str, int, int]], origin: np.ndarray, old: bool = False
) -> Path:
    """Write layers [K, J, I] as 3D Slicer does; segments are (name, layer, label value).

    The grid is that of `affine` in LPS: i to the left, j to the front, k to the head; `origin` in LPS.
    """
    array = np.stack(layers, axis=-1).astype(np.uint8)
    sizes = " ".join(map(str, reversed(array.shape)))
    lines = [
        "NRRD0004", "type: unsigned char", "dimension: 4", "space: left-posterior-superior", f"sizes: {sizes}",
        f"space directions: none ({SPACING[0]},0,0) (0,{-SPACING[1]},0) (0,0,{SPACING[2]})",
        "kinds: list domain domain domain", "encoding: gzip",
        f"space origin: ({','.join(map(str, origin))})",
    ]  # fmt: skip
    for number, (name, layer, value) in enumerate(segments):
        lines += [f"Segment{number}_ID:=Segment_{number}", f"Segment{number}_Name:={name}"]
        if not old:
            lines += [f"Segment{number}_LabelValue:={value}", f"Segment{number}_Layer:={layer}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + "\n\n").encode() + gzip.compress(array.tobytes()))
    return path


def save_dicom(folder: Path, voxels: np.ndarray, patient: str) -> list:
    """Write Hounsfield units [I, J, K] on the grid of `affine` as a CT series; its data sets, feet to head."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    folder.mkdir(parents=True, exist_ok=True)
    slices = []
    # RAS to LPS; rows run to the front, which is DICOM's -y.
    origin = np.diag([-1, -1, 1, 1]) @ affine()
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        one = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.PatientID, one.PatientName = patient, f"{patient}^Name"
        one.PatientBirthDate, one.PatientSex, one.StudyDate, one.StudyTime = "19700101", "F", "20200101", "120000"
        one.StudyID, one.AccessionNumber, one.ReferringPhysicianName = "1", "A-1", "House^Gregory"
        one.Modality, one.SeriesNumber, one.InstanceNumber = "CT", 3, k + 1
        one.ImageType, one.PositionReferenceIndicator = ["ORIGINAL", "PRIMARY", "AXIAL"], ""
        one.ImageOrientationPatient = [1, 0, 0, 0, -1, 0]
        one.ImagePositionPatient = [f"{value:.6f}" for value in (origin @ [0, 0, k, 1])[:3]]
        one.PixelSpacing, one.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        one.Rows, one.Columns = voxels.shape[1], voxels.shape[0]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept = 1, -1024
        one.PixelData = (voxels[..., k].T.astype(np.int32) + 1024).astype("<i2").tobytes()
        one.save_as(folder / f"{(k * 5) % 7}_{k}.dcm", enforce_file_format=True)
        slices.append(one)
    return slices


def save_dicom_seg(path: Path, slices: list, masks: dict[str, np.ndarray]) -> Path:
    """Write bool masks [I, J, K], which may overlap, as a DICOM segmentation of a series of `save_dicom`."""
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    about = highdicom.AlgorithmIdentificationSequence("hand", codes.DCM.ArtificialIntelligence, "1")
    segments = [
        highdicom.seg.SegmentDescription(
            number, name, codes.SCT.Organ, codes.SCT.Organ, highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC, about
        )
        for number, name in enumerate(masks, start=1)
    ]
    pixels = np.stack([mask.transpose(2, 1, 0) for mask in masks.values()], axis=-1).astype(np.uint8)
    segmentation = highdicom.seg.Segmentation(
        slices, pixels, highdicom.seg.SegmentationTypeValues.BINARY, segments, generate_uid(), 100, generate_uid(), 1,
        "ACME", "M1", "1", "0",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    segmentation.save_as(path)
    return path


def save_structure_set(path: Path, slices: list, rois: dict[str, list[np.ndarray]]) -> Path:
    """Write contours, millimetres [N, 3] in LPS, as a DICOM structure set of a series of `save_dicom`."""
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, RTStructureSetStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    one = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    one.SOPClassUID, one.SOPInstanceUID = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID
    one.SeriesInstanceUID, one.StudyInstanceUID = generate_uid(), slices[0].StudyInstanceUID
    one.PatientID, one.Modality = slices[0].PatientID, "RTSTRUCT"
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = slices[0].SeriesInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = slices[0].FrameOfReferenceUID, [study]
    one.ReferencedFrameOfReferenceSequence = [frame]
    one.StructureSetROISequence, one.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois.items(), start=1):
        about, drawn = Dataset(), Dataset()
        about.ROINumber, about.ROIName, about.ReferencedFrameOfReferenceUID = number, name, frame.FrameOfReferenceUID
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for points in contours:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
            contour.ContourData = [f"{value:.4f}" for value in points.ravel()]
            drawn.ContourSequence.append(contour)
        one.StructureSetROISequence.append(about)
        one.ROIContourSequence.append(drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True)
    return path
