"""DICOM-SEG objects are read back by pydicom, highdicom and SimpleITK where the masks were."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from dicom_files import PATIENT_ID, PATIENT_NAME, write_multiframe, write_series

from ntpseg.volumes.dicom_seg import SERIES_DESCRIPTION, check_sources, write_dicom_seg
from ntpseg.volumes.dicom_sources import source_headers
from ntpseg.volumes.reading import read_volume

pytest.importorskip("highdicom")
SHAPE = (5, 6, 8)
TEXTS = ["The left lung.", "The heart, ventrículo."]


def rotation(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(a / 2), -np.sin(a / 2), 0], [np.sin(a / 2), np.cos(a / 2), 0], [0, 0, 1]])
    return about_x @ about_z


# Columns: steps of i, j and k in LPS. k runs along i x j, or against it.
AFFINES = {
    "axial": np.diag([0.7, 0.8, 2.5]),
    "feet first": np.diag([-0.7, 0.8, -2.5]),
    "against the normal": np.diag([0.7, 0.8, -2.5]),
    "coronal": np.array([[0.7, 0, 0], [0, 0, 3.0], [0, -0.8, 0]]),
    "oblique": rotation(20) * [0.7, 0.8, 2.5],
}


def affine_of(name: str) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = AFFINES[name], [-10, 20, 30]
    return affine


def hounsfield(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape)


def points(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Where the mask's voxels lie in the patient, sorted."""
    k, j, i = np.nonzero(mask)
    world = np.stack([i, j, k, np.ones(len(i))], axis=1) @ affine.T
    return np.array(sorted(np.round(world[:, :3], 3).tolist()))


def masks_of(count: int, overlap: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, count + 1, SHAPE)
    masks = [labels == number for number in range(1, count + 1)]
    if overlap:
        masks[1] |= masks[0] & (rng.random(SHAPE) > 0.5)
    return masks


def segment(path: Path, source: Path, masks: list[np.ndarray], texts: list[str]) -> Path:
    volume = read_volume(source)
    # Given where the series was written, turned to where the reader stores it.
    write_dicom_seg(path, masks, texts, volume.stored, source_headers(source))
    return path


def onto(volume_affine: np.ndarray, mask: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """A mask on the grid of one affine, on that of another with the same points."""
    k, j, i = np.nonzero(mask)
    world = volume_affine @ np.stack([i, j, k, np.ones(len(i))])
    place = np.rint(np.linalg.solve(stored, world)[:3]).astype(int)
    turned = np.zeros(mask.shape, bool)
    turned[place[2], place[1], place[0]] = True
    return turned


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("kind", ["series", "multi-frame"])
def test_a_segmentation_lies_where_its_series_does(tmp_path: Path, kind: str, name: str, overlap: bool) -> None:
    import highdicom
    import pydicom

    affine, masks = affine_of(name), masks_of(2, overlap)
    if kind == "series":
        source = write_series(tmp_path / "ct", hounsfield(), affine)
    else:
        source = write_multiframe(tmp_path / "ct.dcm", hounsfield(), affine)
    stored = read_volume(source).stored.affine
    path = segment(tmp_path / "seg.dcm", source, [onto(affine, mask, stored) for mask in masks], TEXTS)
    dataset = pydicom.dcmread(path)
    assert dataset.Modality == "SEG" and dataset.SegmentsOverlap == ("YES" if overlap else "NO")
    assert [segment.SegmentLabel for segment in dataset.SegmentSequence] == TEXTS
    assert [segment.SegmentDescription for segment in dataset.SegmentSequence] == TEXTS
    found = highdicom.seg.segread(path).get_volume(combine_segments=False)
    # highdicom's affine is from (k, j, i).
    turned = found.affine[:, [2, 1, 0, 3]]
    for number, mask in enumerate(masks):
        np.testing.assert_allclose(points(found.array[..., number] > 0, turned), points(mask, affine), atol=2e-3)


def test_a_segmentation_refers_to_its_series_and_tells_what_made_it(tmp_path: Path) -> None:
    import pydicom

    from ntpseg import __version__

    source = write_series(tmp_path / "ct", hounsfield(), affine_of("axial"))
    dataset = pydicom.dcmread(segment(tmp_path / "seg.dcm", source, masks_of(1, False), TEXTS[:1]))
    slices = [pydicom.dcmread(file) for file in source.iterdir()]
    (reference,) = dataset.ReferencedSeriesSequence
    assert reference.SeriesInstanceUID == slices[0].SeriesInstanceUID != dataset.SeriesInstanceUID
    referenced = {item.ReferencedSOPInstanceUID for item in reference.ReferencedInstanceSequence}
    assert referenced == {slice_.SOPInstanceUID for slice_ in slices}
    assert dataset.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert dataset.StudyInstanceUID == slices[0].StudyInstanceUID
    # The standard wants these in the object.
    assert dataset.PatientID == PATIENT_ID and dataset.PatientName == PATIENT_NAME
    (algorithm,) = dataset.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("ntpseg", __version__)
    assert dataset.SeriesDescription == SERIES_DESCRIPTION


def test_one_segment_has_a_frame_for_every_slice_also_where_nothing_is_found(tmp_path: Path) -> None:
    import pydicom

    source = write_series(tmp_path / "ct", hounsfield(), affine_of("axial"))
    mask = np.zeros(SHAPE, bool)
    for name, filled in (("none", ()), ("one", (2,))):
        for k in filled:
            mask[k, 1:3, 2:5] = True
        dataset = pydicom.dcmread(segment(tmp_path / f"{name}.dcm", source, [mask], TEXTS[:1]))
        assert dataset.NumberOfFrames == SHAPE[0]
        assert dataset.pixel_array.sum() == mask.sum()


@pytest.mark.parametrize("name", AFFINES)
def test_simpleitk_opens_one_segment_where_its_series_is(tmp_path: Path, name: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    source = write_series(tmp_path / "ct", hounsfield(), affine_of(name))
    mask, stored = masks_of(1, False)[0], read_volume(source).stored.affine
    path = segment(tmp_path / "seg.dcm", source, [onto(affine_of(name), mask, stored)], TEXTS[:1])
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    found = sitk.GetArrayFromImage(image) > 0
    np.testing.assert_allclose(points(found, affine), points(mask, affine_of(name)), atol=2e-3)


def test_long_sentences_and_incomplete_sources_are_written(tmp_path: Path) -> None:
    import pydicom

    source = write_series(tmp_path / "ct", hounsfield(), affine_of("axial"))
    for file in source.iterdir():
        dataset = pydicom.dcmread(file)
        del dataset.PatientSex, dataset.AccessionNumber, dataset.StudyID, dataset.FrameOfReferenceUID
        del dataset.StudyDate, dataset.StudyTime, dataset.PatientBirthDate, dataset.ReferringPhysicianName
        dataset.SpecificCharacterSet, dataset.PatientName = "ISO_IR 100", "Müller^Jörg"
        dataset.save_as(file)
    text = "The nodule \\ mass in the " + "very " * 20 + "lower lobe."
    dataset = pydicom.dcmread(segment(tmp_path / "seg.dcm", source, masks_of(1, False), [text]))
    (found,) = dataset.SegmentSequence
    assert len(found.SegmentLabel) == 64 and found.SegmentLabel.startswith("The nodule / mass in the very")
    assert found.SegmentDescription == text
    assert str(dataset.PatientName) == "Müller^Jörg"


def test_another_series_is_refused(tmp_path: Path) -> None:
    source = write_series(tmp_path / "ct", hounsfield(), affine_of("axial"))
    other = write_series(tmp_path / "other", hounsfield((4, 6, 8)), affine_of("axial"))
    with pytest.raises(ValueError, match=r"must be of the series that was read, \[5, 6, 8\] voxels, got 4 slices"):
        write_dicom_seg(
            tmp_path / "x.dcm", masks_of(1, False), TEXTS[:1], read_volume(source).stored, source_headers(other)
        )
    assert not (tmp_path / "x.dcm").exists()


def test_a_header_that_is_not_as_the_standard_wants_is_refused_without_its_content(tmp_path: Path) -> None:
    import pydicom

    source = write_series(tmp_path / "ct", hounsfield(), affine_of("axial"))
    for file in source.iterdir():
        dataset = pydicom.dcmread(file)
        dataset["PatientBirthDate"]._value = "in spring"
        dataset.save_as(file)
    stored = read_volume(source).stored
    with pytest.raises(
        ValueError, match=r"whose header is as the standard wants, .* \(ValueError\); end --out in"
    ) as seen:
        check_sources(source_headers(source), stored)
    assert "spring" not in str(seen.value) and seen.value.__cause__ is None


def test_slices_without_positions_are_refused(tmp_path: Path) -> None:
    import pydicom

    source = write_series(tmp_path / "ct", hounsfield(), affine_of("axial"))
    stored = read_volume(source).stored
    for file in source.iterdir():
        dataset = pydicom.dcmread(file)
        del dataset.ImagePositionPatient
        dataset.save_as(file)
    with pytest.raises(ValueError, match=r"must be of a series that states its slices' positions, got one without"):
        check_sources(source_headers(source), stored)


@pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) checks objects against the standard"
)
@pytest.mark.parametrize("count", [1, 2])
def test_the_standards_checker_finds_no_fault(tmp_path: Path, count: int) -> None:
    source = write_series(tmp_path / "ct", hounsfield(), affine_of("axial"))
    masks = masks_of(count, overlap=False)
    path = segment(tmp_path / "seg.dcm", source, masks, [f"sentence {n}" for n in range(count)])
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "Segmentation" in done.stderr
    assert "Error" not in done.stderr and "Warning" not in done.stderr, done.stderr
