import itertools

import numpy as np
import pytest

from ntpseg.volumes import AXES, Geometry, Volume

# LPS direction of each letter.
DIRECTIONS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
CODES = [
    "".join(letters) for order in itertools.permutations(("LR", "PA", "SI")) for letters in itertools.product(*order)
]


def stored(code: str, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """An array whose voxels hold their own position in millimetres, and its affine."""
    spacing, shape = (0.7, 1.3, 2.5), (4, 5, 6)  # of i, j, k
    affine = np.eye(4)
    affine[:3, :3] = 0
    for n, letter in enumerate(code):
        axis, sign = DIRECTIONS[letter]
        affine[axis, n] = sign * spacing[n]
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = (-30.0, 12.0, 7.0)
    k, j, i = np.meshgrid(*(np.arange(n) for n in shape[::-1]), indexing="ij")
    position = np.stack([i, j, k, np.ones_like(i)], -1) @ affine.T
    return position, affine


@pytest.mark.parametrize("tilt", [0.0, 0.3])
@pytest.mark.parametrize("code", CODES)
def test_all_48_orientations_become_lps_and_keep_their_place(code, tilt):
    position, affine = stored(code, tilt)
    assert Geometry(position.shape[:3], affine).orientation == code
    for axis in range(3):
        volume = Volume.from_stored(position[..., axis], affine)
        assert volume.geometry.orientation == "LPS"
        k, j, i = np.meshgrid(*(np.arange(n) for n in volume.voxels.shape), indexing="ij")
        place = np.stack([i, j, k, np.ones_like(i)], -1) @ volume.geometry.affine.T
        np.testing.assert_allclose(volume.voxels, place[..., axis], atol=1e-9)
        np.testing.assert_array_equal(volume.to_stored(volume.voxels), position[..., axis])


@pytest.mark.parametrize("axis", AXES)
def test_slices_are_as_displayed(axis):
    position, affine = stored("RAI")
    x, y, z = (Volume.from_stored(position[..., n], affine).slice(1, axis) for n in range(3))
    across, down = {"axial": (x, y), "coronal": (x, -z), "sagittal": (y, -z)}[axis]
    # Columns run to the left (or back), rows to the back (or feet).
    assert (np.diff(across, axis=1) > 0).all() and (np.diff(down, axis=0) > 0).all()
    volume = Volume.from_stored(position[..., 0], affine)
    rows, columns = volume.pixel_spacing(axis)
    assert rows == pytest.approx(np.diff(down, axis=0).mean()) and columns == pytest.approx(
        np.diff(across, axis=1).mean()
    )
    assert volume.count(axis) == {"axial": 6, "coronal": 5, "sagittal": 4}[axis]


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.eye(3), np.full((4, 4), np.nan)])
def test_an_affine_that_places_nothing_is_refused(affine):
    with pytest.raises(ValueError, match="affine must be an invertible"):
        Volume.from_stored(np.zeros((2, 2, 2)), affine)


def test_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"voxels must be \[D, H, W\]"):
        Volume.from_stored(np.zeros((2, 2)), np.eye(4))
    with pytest.raises(ValueError, match="grid's shape"):
        Volume.from_stored(np.zeros((2, 3, 4)), np.eye(4)).to_stored(np.zeros((2, 3, 5)))
