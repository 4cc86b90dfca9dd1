"""Label volumes as NIfTI have the grid, the header's geometry and the voxels that they should."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntpseg.volumes import Volume
from ntpseg.volumes.label_nifti import write_label_nifti
from ntpseg.volumes.reading import read_volume

nibabel = pytest.importorskip("nibabel")
SHAPE = (5, 6, 7)  # i, j, k
RAS = {
    "las": np.diag([-0.7, 0.8, 2.5]),
    "ras": np.diag([0.7, 0.8, 2.5]),
    "psr": np.array([[0, 0, 3.0], [-0.8, 0, 0], [0, 1.2, 0]]),
    "oblique": np.array([[0.68, -0.1, 0.2], [0.12, 0.78, 0.3], [-0.1, -0.13, 2.45]]),
}


def affine_of(name: str) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = RAS[name], [-10, 20, 30]
    return affine


def labels_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)


def write(path: Path, affine: np.ndarray, shape: tuple[int, ...] = SHAPE, kind: Any = None, **codes: Any) -> Path:
    image = (kind or nibabel.Nifti1Image)(np.zeros(shape, np.int16), affine)
    image.set_qform(affine, code=codes.get("qform", 1), strip_shears=True)
    image.set_sform(affine, code=codes.get("sform", 1))
    image.header["descrip"] = b"Doe^Jane 1970"
    if kind is None:
        image.header["db_name"] = b"MRN-4711"
    nibabel.save(image, path)
    return path


def label(source: Path, out: Path) -> np.ndarray:
    volume = read_volume(source)
    labels = labels_of(volume.stored.shape)
    write_label_nifti(out, labels, volume.stored, source)
    return labels.transpose(2, 1, 0)


@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (1, 0), (4, 2), (0, 0)])
@pytest.mark.parametrize("name", RAS)
def test_nifti_in_nifti_out_on_the_same_grid(tmp_path: Path, name: str, codes: tuple[int, int]) -> None:
    source = write(tmp_path / "ct.nii.gz", affine_of(name), qform=codes[0], sform=codes[1])
    voxels = label(source, tmp_path / "seg.nii.gz")
    before, after = nibabel.load(source), nibabel.load(tmp_path / "seg.nii.gz")
    assert after.shape == before.shape
    np.testing.assert_array_equal(after.affine, before.affine)
    for field in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "qoffset_x", "xyzt_units"):
        np.testing.assert_array_equal(after.header[field], before.header[field])
    assert after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(after.dataobj), voxels)


@pytest.mark.parametrize("name", ["las", "psr", "oblique"])
def test_simpleitk_sees_the_same_grid_and_voxels(tmp_path: Path, name: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    # ITK refuses an affine that is not orthogonal.
    affine = affine_of(name)
    if name == "oblique":
        turn, _ = np.linalg.qr(affine[:3, :3])
        affine[:3, :3] = turn * [0.7, 0.8, 2.5]
    source = write(tmp_path / "ct.nii.gz", affine)
    voxels = label(source, tmp_path / "seg.nii.gz")
    before, after = (sitk.ReadImage(str(tmp_path / f)) for f in ("ct.nii.gz", "seg.nii.gz"))
    for get in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(before, get)() == getattr(after, get)(), get
    np.testing.assert_array_equal(sitk.GetArrayFromImage(after).transpose(2, 1, 0), voxels)


@pytest.mark.parametrize("shape", [(5, 6, 1), (5, 6, 7, 1), (5, 6)])
def test_shapes_with_axes_of_one_are_kept(tmp_path: Path, shape: tuple[int, ...]) -> None:
    source = write(tmp_path / "ct.nii", affine_of("las"), shape)
    voxels = label(source, tmp_path / "seg.nii")
    after = nibabel.load(tmp_path / "seg.nii")
    assert after.shape == nibabel.load(source).shape
    np.testing.assert_array_equal(np.asarray(after.dataobj).ravel(), voxels.ravel())


def test_nifti_2_stays_nifti_2(tmp_path: Path) -> None:
    source = write(tmp_path / "ct.nii", affine_of("las"), kind=nibabel.Nifti2Image)
    label(source, tmp_path / "seg.nii")
    assert isinstance(nibabel.load(tmp_path / "seg.nii"), nibabel.Nifti2Image)


def test_no_text_of_a_header_is_copied_and_equal_labels_are_equal_files(tmp_path: Path) -> None:
    source = write(tmp_path / "ct.nii.gz", affine_of("las"))
    for name in ("a.nii.gz", "b.nii.gz"):
        label(source, tmp_path / name)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert b"Doe" not in gzip.decompress(content) and b"MRN" not in gzip.decompress(content)


@pytest.mark.parametrize("name", ["las", "psr", "oblique"])
def test_other_sources_give_the_affine_by_itself(tmp_path: Path, name: str) -> None:
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    volume = Volume.from_stored(np.zeros(SHAPE[::-1]), to_lps @ affine_of(name))
    labels = labels_of(volume.stored.shape)
    write_label_nifti(tmp_path / "seg.nii.gz", labels, volume.stored)
    after = nibabel.load(tmp_path / "seg.nii.gz")
    np.testing.assert_allclose(after.affine, affine_of(name), atol=1e-5)
    # Without shear both forms say it; a qform cannot hold one.
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == (1, 0 if name == "oblique" else 1)
    assert after.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(np.asarray(after.dataobj), labels.transpose(2, 1, 0))


def test_labels_of_another_grid_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "ct.nii.gz", affine_of("las"))
    volume = read_volume(source)
    with pytest.raises(ValueError, match=r"labels must have the grid of .*, \[5, 6, 7\], got \[5, 6, 6\]"):
        write_label_nifti(tmp_path / "seg.nii.gz", np.zeros((6, 6, 5), np.uint8), volume.stored, source)
    assert [path.name for path in tmp_path.iterdir()] == ["ct.nii.gz"]
