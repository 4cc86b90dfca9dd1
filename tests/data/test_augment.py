"""Image, mask and sentence of a variant belong together."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntpseg.data import Augmentation, load_records, swap_laterality
from ntpseg.data.demo_structures import STRUCTURES

STILL = Augmentation(flip=0, rotate_degrees=0, scale=0, translate=0, brightness=0, contrast=0, gamma=0, noise=0)


def pair(side: int = 32, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((1, side, side), np.float32)
    mask[0, 6:16, 4:12] = 1
    image = np.repeat(mask * 1.2 - 0.6, channels, axis=0)
    return image.astype(np.float32), mask


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("The upper lobe of the left lung.", "The upper lobe of the right lung."),
        ("Left and RIGHT, left.", "Right and LEFT, right."),
        ("a left-sided effusion", "a right-sided effusion"),
        ("leftmost, rightward", "rightmost, leftward"),
        ("an upright film, a cleft", "an upright film, a cleft"),
        ("the left_lung", "the right_lung"),
        ("the heart", "the heart"),
        ("", ""),
        (
            "Bilateral pulmonary infection, two infected areas, all left lung and middle lower right lung.",
            "Bilateral pulmonary infection, two infected areas, middle lower left lung and all right lung.",
        ),
        (
            "Unilateral pulmonary infection, one infected area, lower left lung.",
            "Unilateral pulmonary infection, one infected area, lower right lung.",
        ),
        (
            "Left pleural fluid, all left lung and lower right lung.",
            "Right pleural fluid, lower left lung and all right lung.",
        ),
        # Words that say something of both lungs stay where they are.
        (
            "Chest film, no left lung and right lung involvement.",
            "Chest film, no right lung and left lung involvement.",
        ),
        (
            "Small left lung and right lung nodules, larger left lung and no right lung nodules.",
            "Small right lung and left lung nodules, larger right lung and no left lung nodules.",
        ),
    ],
)
def test_swap_laterality(text: str, swapped: str) -> None:
    assert swap_laterality(text) == swapped
    assert swap_laterality(swapped) == text


words = st.sampled_from(
    ["left", "Right", "LEFT", "right-sided", "lung", "upright", "lung and", ", all", "the", "left lung"]
)


@settings(deadline=None)
@given(st.lists(words, max_size=12))
def test_swapping_twice_gives_the_text_back(parts: list[str]) -> None:
    text = " ".join(parts)
    assert swap_laterality(swap_laterality(text)) == text


def test_demo_sentences_change_exactly_where_they_name_a_side() -> None:
    for structure in STRUCTURES:
        for sentence in structure.sentences():
            sided = re.search(r"\b(left|right)\b", sentence) is not None
            assert (swap_laterality(sentence) != sentence) == sided


def test_no_change_is_the_identity() -> None:
    image, mask = pair(channels=3)
    changed = STILL.apply(image, mask, "left", np.random.default_rng(0))
    np.testing.assert_allclose(changed[0], image, atol=1e-6)
    np.testing.assert_array_equal(changed[1], mask)
    assert changed[2] == "left"


def test_flip_mirrors_all_three() -> None:
    image, mask = pair()
    flipped = Augmentation(1, 0, 0, 0, 0, 0, 0, 0).apply(image, mask, "left lung", np.random.default_rng(0))
    np.testing.assert_allclose(flipped[0], image[:, :, ::-1], atol=1e-6)
    np.testing.assert_array_equal(flipped[1], mask[:, :, ::-1])
    assert flipped[2] == "right lung"


def test_flip_is_off_by_default_and_a_probability() -> None:
    image, mask = pair()
    rng = np.random.default_rng(0)
    assert all(Augmentation().apply(image, mask, "left", rng)[2] == "left" for _ in range(50))
    half = Augmentation(1 / 2, 0, 0, 0, 0, 0, 0, 0)
    number = sum(half.apply(image, mask, "left", rng)[2] == "right" for _ in range(400))
    assert 160 < number < 240


def test_image_and_mask_move_together() -> None:
    image, mask = pair(64)
    rng = np.random.default_rng(0)
    move = Augmentation(0.5, 25, 0.3, 0.15, 0, 0, 0, 0)
    moved = 0
    for _ in range(50):
        new_image, new_mask, _ = move.apply(image, mask, "", rng)
        # The picture is the mask in other grey values, so thresholding it must give the mask again.
        seen = new_image > 0
        assert (seen != (new_mask > 0)).mean() < 0.01
        moved += not np.array_equal(new_mask, mask)
    assert moved > 45


def test_rotation_and_scale_keep_their_limits() -> None:
    side = 65
    mask = np.zeros((1, side, side), np.float32)
    mask[0, 22:43, 22:43] = 1
    rng = np.random.default_rng(1)
    areas = [Augmentation(0, 20, 0.2, 0, 0, 0, 0, 0).apply(mask - 0.5, mask, "", rng)[1].sum() for _ in range(200)]
    assert 21**2 / 1.2**2 * 0.9 < min(areas) < 21**2 * 0.8
    assert 21**2 * 1.25 < max(areas) < 21**2 * 1.2**2 * 1.1


def test_rotation_is_rigid_about_the_centre() -> None:
    side = 101
    mask = np.zeros((1, side, side), np.float32)
    mask[0, 48:53, 10:91] = 1
    rng = np.random.default_rng(6)
    angles = []
    for _ in range(30):
        turned = np.argwhere(Augmentation(0, 30, 0, 0, 0, 0, 0, 0).apply(mask - 0.5, mask, "", rng)[1][0])
        np.testing.assert_allclose(turned.mean(0), 50, atol=0.6)
        spread, axes = np.linalg.eigh(np.cov(turned.T))
        # A bar of 81 x 5 pixels stays one: variance of a uniform distribution is length^2 / 12.
        np.testing.assert_allclose(np.sqrt(12 * spread), [5, 81], rtol=0.12)
        angles.append(np.degrees(np.arctan(axes[0, 1] / axes[1, 1])))
    assert min(angles) < -15 and max(angles) > 15 and np.abs(angles).max() < 31


def test_shift_keeps_its_limit() -> None:
    image, mask = pair(64)
    centres = []
    rng = np.random.default_rng(2)
    for _ in range(200):
        moved = Augmentation(0, 0, 0, 0.05, 0, 0, 0, 0).apply(image, mask, "", rng)[1][0]
        centres.append(np.argwhere(moved).mean(0) - np.argwhere(mask[0]).mean(0))
    shift = np.abs(np.array(centres)).max(0)
    assert ((shift > 2.0) & (shift <= 0.05 * 64 + 0.5)).all()


def test_small_mask_at_the_edge_never_vanishes() -> None:
    mask = np.zeros((1, 32, 32), np.float32)
    mask[0, 0, 0] = 1
    rng = np.random.default_rng(3)
    strong = Augmentation(0.5, 45, 0.5, 0.4)
    assert all(strong.apply(mask - 0.5, mask, "", rng)[1].any() for _ in range(100))


def test_light_stays_in_range_and_leaves_the_mask() -> None:
    image, mask = pair(channels=3)
    rng = np.random.default_rng(4)
    for _ in range(20):
        lit, same, _ = Augmentation(0, 0, 0, 0, 0.5, 1, 1, 0.5).apply(image, mask, "", rng)
        assert lit.dtype == np.float32 and lit.flags.c_contiguous
        assert lit.min() >= -1 and lit.max() <= 1 and np.isfinite(lit).all()
        np.testing.assert_array_equal(same, mask)
        assert not np.allclose(lit, image)


def test_same_seed_same_variant_and_arguments_untouched() -> None:
    image, mask = pair()
    before = image.copy(), mask.copy()
    full = Augmentation(flip=0.5)
    first, second = (full.apply(image, mask, "left", np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[2] == second[2]
    first[0][:] = 7
    first[1][:] = 7
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


def test_results_do_not_share_memory_with_the_original() -> None:
    image, mask = pair()
    _, same, _ = STILL.apply(image, mask, "", np.random.default_rng(0))
    assert not np.shares_memory(same, mask)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"flip": 1.5}, "flip"),
        ({"noise": -1}, "noise"),
        ({"translate": 1.0}, "translate"),
        ({"scale": float("nan")}, "scale"),
    ],
)
def test_options_out_of_range(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Augmentation(**options)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[C, S, S\]"):
        STILL.apply(np.zeros((8, 8), np.float32), np.zeros((1, 8, 8), np.float32), "", np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [None, [[0.0]], np.zeros((1, 8, 8), np.uint8), np.zeros((1, 8, 8), bool)])
def test_wrong_arrays_are_named(wrong: object) -> None:
    right = np.zeros((1, 8, 8), np.float32)
    for name, pair in (("image", (wrong, right)), ("mask", (right, wrong))):
        with pytest.raises(ValueError, match=rf"^{name} must be a float32 array, got "):
            STILL.apply(*pair, "", np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"^image must be \[C, S, S\] with C, S >= 1, got \[1, 0, 0\]"):
        STILL.apply(right[:, :0, :0], right[:, :0, :0], "", np.random.default_rng(0))


@pytest.mark.data
def test_flipped_captions_of_real_xrays_are_captions_again(shared_data: Path) -> None:
    texts = {record.text for record in load_records(shared_data / "cxr_referring")}
    assert swap_laterality("The left lung.") in texts
    for text in texts:
        assert swap_laterality(swap_laterality(text)) == text
        # QaTa's grammar names the left lung first, also after a flip.
        assert swap_laterality(text).find("right lung and") == -1
