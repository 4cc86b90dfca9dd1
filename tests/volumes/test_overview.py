"""`ntpseg data check` of files as a scanner or an archive gives them: groups, faults, and nothing of the patient."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")
pytest.importorskip("SimpleITK")
from dicom_files import ct_slices, write_series  # noqa: E402

from ntpseg.cli import app  # noqa: E402
from ntpseg.volumes import list_series, read_volume  # noqa: E402
from ntpseg.volumes.overview import survey  # noqa: E402
from ntpseg.volumes.privacy import burnt_in_warning  # noqa: E402

AFFINE = np.diag([0.75, 0.5, 2.0, 1.0])
VOXELS = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 8)).astype(np.int16)
SENTINEL = "ZQXSENTINEL"


def check(path: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "check", str(path)], env={"COLUMNS": "250"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_series_and_volumes_are_grouped(tmp_path: Path) -> None:
    write_series(tmp_path / "a", VOXELS, AFFINE)
    write_series(tmp_path / "b", VOXELS[:3, :4], AFFINE)
    nibabel.save(nibabel.Nifti1Image(VOXELS.T, np.diag([2.0, 3.0, 4.0, 1.0])), tmp_path / "c.nii.gz")
    (tmp_path / "notes.txt").write_text("no image")
    overview = survey(tmp_path)
    assert overview.faults == ()
    dicom, nifti = overview.groups
    assert (dicom.source, dicom.modality, dicom.orientation, dicom.volumes, dicom.slices) == (
        "dicom",
        "CT",
        "LPS",
        2,
        8,
    )
    assert dicom.sizes == ((3, 4, 8), (5, 6, 8))
    np.testing.assert_allclose(dicom.spacing, ((2.0, 0.5, 0.75),) * 2)
    assert dicom.windows == ("-160..239",)
    assert (nifti.source, nifti.modality, nifti.orientation, nifti.spacing) == (
        "nifti",
        "",
        "RAS",
        ((4.0, 3.0, 2.0),) * 2,
    )
    code, text = check(tmp_path)
    assert code == 0 and "3..5 x 4..6 x 8" in text and "2 x 0.5 x 0.75" in text and "3 can be read, 0 cannot" in text


def test_what_cannot_be_read_is_one_line_each_and_exit_code_1(tmp_path: Path) -> None:
    write_series(tmp_path / "a", VOXELS, AFFINE)
    broken = tmp_path / "broken.nii"
    nibabel.save(nibabel.Nifti1Image(VOXELS.T, np.eye(4)), broken)
    broken.write_bytes(broken.read_bytes()[:400])
    code, text = check(tmp_path)
    assert code == 1 and "1 can be read, 1 cannot" in text
    assert len([line for line in text.splitlines() if "broken.nii" in line]) == 1
    missing = write_series(tmp_path / "gap", VOXELS, AFFINE)
    next(p for p in missing.iterdir() if pydicom.dcmread(p).InstanceNumber == 3).unlink()
    assert len(survey(missing).faults) == 1


@pytest.mark.parametrize(
    ("modality", "burnt_in", "warned"),
    [("CT", True, True), ("US", None, True), ("OT", None, True), ("CT", None, False), ("US", False, False)],
)
def test_burnt_in_text(tmp_path: Path, modality: str, burnt_in: bool | None, warned: bool) -> None:
    assert bool(burnt_in_warning(modality, burnt_in)) == warned
    file = ct_slices(VOXELS[:1], AFFINE)[0]
    file.Modality = modality
    if burnt_in is not None:
        file.BurnedInAnnotation = "YES" if burnt_in else "NO"
    file.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert ("BurnedInAnnotation" in check(tmp_path)[1]) == warned


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("jane_ct.dcm", "patient's name of the header"),
        ("scan-MRN-4711.dcm", "PatientID of the header"),
        ("x_1970-01-01.dcm", "birth date of the header"),
        ("Roe^Richard.dcm", "LASTNAME^FIRSTNAME"),
        ("janet.dcm", ""),
        ("slice-47110.dcm", ""),
    ],
)
def test_names_in_paths_are_warned_of_and_not_repeated(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "raw").mkdir()
    ct_slices(VOXELS[:1], AFFINE)[0].save_as(tmp_path / "raw" / name, enforce_file_format=True)
    overview = survey(tmp_path / "raw")
    assert [found in warning for warning, _ in overview.privacy] == ([True] if found else [])
    assert not re.search("jane|doe|4711|1970|roe", repr(overview), re.IGNORECASE)
    assert not re.search("jane|doe|4711|roe^", check(tmp_path / "raw")[1], re.IGNORECASE)


def test_nothing_that_identifies_leaves_the_header(tmp_path: Path) -> None:
    from pydicom.datadict import dictionary_VR

    folder = tmp_path / "raw"
    folder.mkdir()
    texts = [
        *("PatientName", "PatientID", "OtherPatientIDs", "PatientAddress", "PatientComments", "InstitutionName"),
        *("InstitutionAddress", "ReferringPhysicianName", "OperatorsName", "StudyDescription", "SeriesDescription"),
        *("ProtocolName", "AccessionNumber", "StudyID", "StationName", "DeviceSerialNumber", "ImageComments"),
        *("RescaleType", "RequestedProcedureDescription", "Manufacturer", "BodyPartExamined"),
    ]
    dates = ["PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"]
    slices = ct_slices(VOXELS, AFFINE)
    for file in slices:
        for tag in texts:
            setattr(file, tag, SENTINEL if dictionary_VR(tag) != "SH" else SENTINEL[:16])
        for tag in dates:
            setattr(file, tag, "19010203")
        file.StudyInstanceUID = file.FrameOfReferenceUID = "1.2.777888999"
        file.SeriesInstanceUID = "1.2.777888999.1"
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = f"1.2.777888999.2.{file.InstanceNumber}"
        file.private_block(0x0009, SENTINEL, create=True).add_new(1, "LO", SENTINEL)
        file.save_as(folder / f"{file.InstanceNumber}.dcm", enforce_file_format=True)
    secret = re.compile(f"{SENTINEL}|19010203|777888999", re.IGNORECASE)
    before = sorted(tmp_path.rglob("*"))

    volume, overview = read_volume(folder), survey(folder)
    seen = [repr(volume.header), str(volume.header), repr(volume), repr(overview)]
    seen += [str(info) for info in list_series(folder)] + [repr(info) for info in list_series(folder)]
    seen.append(check(folder)[1])
    with pytest.raises(ValueError) as wrong:
        read_volume(folder, series="99")
    seen.append(str(wrong.value))
    (folder / "3.dcm").unlink()
    seen.append(check(folder)[1])
    damaged = folder / "4.dcm"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (folder / "1.dcm").unlink()
    (folder / "2.dcm").unlink()
    with pytest.raises(ValueError) as wrong:
        read_volume(folder)
    seen.append(str(wrong.value))
    assert [text for text in seen if secret.search(text)] == []
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] == []
