"""Label maps on the grid of their images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ntpseg.importers.alignment import aligned_labels, nearest_labels
from ntpseg.volumes import Geometry, Header, Volume


def affine(spacing=(1.0, 1.0, 2.0), origin=(0.0, 0.0, 0.0)) -> np.ndarray:
    matrix = np.diag([*spacing, 1.0])
    matrix[:3, 3] = origin
    return matrix


IMAGE = Volume.from_stored(np.zeros((4, 6, 8), np.int16), affine())
LABELS = np.random.default_rng(0).integers(0, 5, (4, 6, 8)).astype(np.uint8)


def test_one_grid_leaves_every_label_as_it_is():
    found = aligned_labels("a", IMAGE, Volume.from_stored(LABELS, affine(origin=(0.0, 0.03, 0.0))))
    np.testing.assert_array_equal(found, LABELS)
    found = aligned_labels("a", IMAGE, Volume.from_stored(LABELS.astype(np.float64), affine()))
    assert np.issubdtype(found.dtype, np.integer)
    np.testing.assert_array_equal(found, LABELS)


def test_labels_stored_in_another_orientation_are_turned_not_resampled():
    turned = np.diag([-1.0, -1.0, 2.0, 1.0])
    turned[:3, 3] = (7.0, 5.0, 0.0)
    labels = Volume.from_stored(LABELS[:, ::-1, ::-1], turned)
    np.testing.assert_array_equal(aligned_labels("a", IMAGE, labels), LABELS)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((4, 6, 8), affine(origin=(0.5, 0, 0))),
        ((4, 6, 8), affine((1.1, 1, 2))),
        ((2, 6, 8), affine((1, 1, 4))),
        ((3, 6, 8), affine()),
    ],
)
def test_another_grid_is_an_error_that_shows_both(shape, matrix):
    labels = Volume.from_stored(np.zeros(shape, np.uint8), matrix)
    with pytest.raises(ValueError, match=r"labels of a must have .* got 8x6x.* mm at \(.*\) for 8x6x4 .*--resample"):
        aligned_labels("a", IMAGE, labels)


def test_resampling_takes_the_label_that_a_voxel_lies_in():
    fine = Volume.from_stored(np.zeros((8, 12, 16), np.uint8), affine((0.5, 0.5, 1.0), (-0.25, -0.25, -0.5)))
    found = aligned_labels("a", fine, Volume.from_stored(LABELS, affine()), resample=True)
    np.testing.assert_array_equal(found, LABELS.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    shifted = nearest_labels(LABELS, Geometry((4, 6, 8), affine(origin=(2.2, 0, 0))), IMAGE.geometry)
    np.testing.assert_array_equal(shifted[..., 2:], LABELS[..., :-2])
    assert not shifted[..., :2].any()


def test_a_part_of_the_image_is_placed_voxel_on_voxel():
    part = Volume.from_stored(LABELS[1:3, 2:5, 1:7], affine(origin=(1, 2, 2)))
    expected = np.zeros_like(LABELS)
    expected[1:3, 2:5, 1:7] = LABELS[1:3, 2:5, 1:7]
    np.testing.assert_array_equal(aligned_labels("a", IMAGE, part, cropped=True), expected)
    over_the_edge = Volume.from_stored(LABELS, affine(origin=(-3, 1, 0)))
    expected = np.zeros_like(LABELS)
    expected[:, 1:, :5] = LABELS[:, :-1, 3:]
    np.testing.assert_array_equal(aligned_labels("a", IMAGE, over_the_edge, cropped=True), expected)
    between = Volume.from_stored(LABELS, affine(origin=(0.5, 0, 0)))
    with pytest.raises(ValueError, match="--resample"):
        aligned_labels("a", IMAGE, between, cropped=True)
    far = Volume.from_stored(LABELS + 1, affine(origin=(100, 0, 0)))
    assert not aligned_labels("a", IMAGE, far, cropped=True).any()


def test_without_millimetres_only_the_shape_counts():
    labels = Volume.from_stored(LABELS, affine((3, 3, 3)))
    labels = replace(labels, header=Header(spacing_known=False))
    np.testing.assert_array_equal(aligned_labels("a", IMAGE, labels), LABELS)
    other = replace(Volume.from_stored(LABELS[:3], affine()), header=Header(spacing_known=False))
    with pytest.raises(ValueError, match="export both with the same grid"):
        aligned_labels("a", IMAGE, other, resample=True)


def test_without_millimetres_the_files_own_voxels_are_joined():
    """A NIfTI file is turned by its header; one that knows nothing of the patient must not stay behind."""
    turned = np.diag([-1.0, -1.0, 2.0, 1.0])
    for image_affine, labels_affine in ((turned, affine()), (affine(), turned)):
        image = Volume.from_stored(LABELS.astype(np.int16), image_affine)
        labels = Volume.from_stored(LABELS, labels_affine, Header(spacing_known=False))
        np.testing.assert_array_equal(aligned_labels("a", image, labels), image.voxels)
        image = replace(image, header=Header(spacing_known=False))
        np.testing.assert_array_equal(
            aligned_labels("a", image, Volume.from_stored(LABELS, labels_affine)), image.voxels
        )


def test_labels_are_integers():
    for values, got in ((LABELS / 3, "fractions"), (np.full(LABELS.shape, np.nan), "fractions")):
        with pytest.raises(ValueError, match=f"labels of a must be integers, got {got}"):
            aligned_labels("a", IMAGE, Volume.from_stored(values, affine()))
