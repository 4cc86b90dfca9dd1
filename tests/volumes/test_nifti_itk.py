"""NIfTI, NRRD and MetaImage: voxels and grid as SimpleITK has them; damage and several volumes in one line."""

from __future__ import annotations

import numpy as np
import pytest

from ntpseg.volumes import parse_window, read_volume, render

nibabel = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")
AFFINE = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3.0, 11], [0, 0, 0, 1]])


def same_as_sitk(path) -> None:
    image = sitk.ReadImage(str(path))
    volume = read_volume(path)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    assert np.allclose(volume.stored.affine, affine, atol=1e-4)
    assert np.allclose(volume.to_stored(volume.voxels), sitk.GetArrayFromImage(image))


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_nifti(tmp_path, dtype):
    voxels = np.random.default_rng(0).integers(0, 200, (3, 4, 5)).astype(dtype)
    image = nibabel.Nifti1Image(voxels, AFFINE)
    image.header.set_slope_inter(2, -10)
    image.to_filename(tmp_path / "a.nii.gz")
    same_as_sitk(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mhd"])
def test_itk(tmp_path, name):
    nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE).to_filename(tmp_path / "a.nii")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii")), str(tmp_path / name))
    same_as_sitk(tmp_path / name)


def test_several_volumes_and_damage(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 200, (9, 9, 9, 2)).astype(np.int16)
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"got 2 in a 4-D file; choose one with series 0\.\.1"):
        read_volume(tmp_path / "a.nii.gz")
    chosen = read_volume(tmp_path / "a.nii.gz", series="1")
    assert (chosen.to_stored(chosen.voxels) == voxels[..., 1].transpose(2, 1, 0)).all()
    nibabel.Nifti1Image(voxels[..., 0], np.eye(4)).to_filename(tmp_path / "c.nii.gz")
    with pytest.raises(ValueError, match=r"series must be given for DICOM or a 4-D NIfTI, got '3' for .*c\.nii\.gz"):
        read_volume(tmp_path / "c.nii.gz", series="3")
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"b\.nii\.gz must be a readable NIfTI file") as error:
        read_volume(tmp_path / "b.nii.gz", series="0")
    assert "\n" not in str(error.value)


def test_windows(tmp_path):
    voxels = np.linspace(-1000, 1000, 64).reshape(4, 4, 4).astype(np.float32)
    voxels[0, 0, 0] = np.nan
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    shown = render(volume, "lung+bone+-100..100")
    assert shown.limits == ((-1350.0, 150.0), (-200.0, 1000.0), (-100.0, 100.0))
    assert shown.slice(0).shape == (4, 4, 3) and shown.apply(np.array([np.nan, -100.0, 0.0, 100.0]))[:, 2].tolist() == [
        0,
        0,
        128,
        255,
    ]
    assert str(parse_window(render(volume, "percentile").window)) == render(volume, "percentile").window
    for wrong in ("lungs+", "5..1", "1..nan", "lung+bone"):
        with pytest.raises(ValueError, match="window must"):
            parse_window(wrong)
