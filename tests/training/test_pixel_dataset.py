"""Pairs from the pixel cache: what the augmentation depends on, workers, and the collator's batches."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from pixel_toy import AUGMENTATION, FACTOR, GRID, SIDE, TEXTS, Quadrants, make_cache, make_parts
from torch.utils.data import DataLoader

from ntpseg.tokenizers.text import encode_text
from ntpseg.training.pixel_dataset import PixelDataset


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("pixels"), 6)


def test_without_augmentation_it_is_the_cache(cache) -> None:
    dataset = PixelDataset(cache, seed=3)
    assert len(dataset) == 6
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        for index in range(6):
            sample, pair = dataset[index], cache.pair(index)
            assert sample["sample_ids"] == index and sample["text"] == pair.text
            np.testing.assert_array_equal(sample["image"], pair.image)
            np.testing.assert_array_equal(sample["mask"], pair.mask)


def test_augmentation_depends_on_seed_epoch_and_index_alone(cache) -> None:
    def draw(seed: int, epoch: int, order) -> dict[int, bytes]:
        dataset = PixelDataset(cache, AUGMENTATION, seed=seed)
        dataset.set_epoch(epoch)
        drawn = {}
        for index in order:
            sample = dataset[index]
            drawn[index] = sample["image"].tobytes() + sample["mask"].tobytes() + sample["text"].encode()
            assert set(np.unique(sample["mask"])) <= {0.0, 1.0}
            assert sample["image"].min() >= -1 and sample["image"].max() <= 1
        return drawn

    first = draw(0, 1, range(6))
    np.random.seed(7)
    assert draw(0, 1, reversed(range(6))) == first
    for other in (draw(1, 1, range(6)), draw(0, 2, range(6))):
        assert all(other[index] != first[index] for index in range(6))
    texts = {PixelDataset(cache, AUGMENTATION, seed=seed)[0]["text"] for seed in range(8)}
    assert texts == {TEXTS[0], "The right disc."}, "a flipped image has its sentence's sides exchanged"


@pytest.mark.parametrize("front_end", ["features", "both"])
def test_batches(cache, front_end) -> None:
    sequence, collator = make_parts(front_end)
    dataset = PixelDataset(cache, AUGMENTATION, seed=0)
    samples = [dataset[index] for index in (4, 1, 0)]
    batch = collator(samples)
    vision, low = Quadrants(), sequence.vocabulary.mask_range[0]
    assert batch["pixel_values"].shape == (3, 1, SIDE, SIDE) and batch["mask_pixels"].shape == (3, SIDE, SIDE)
    assert batch["sample_ids"].tolist() == [4, 1, 0]
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(batch["pixel_values"][row], sample["image"])
        np.testing.assert_array_equal(batch["mask_pixels"][row], sample["mask"][0])
        image, mask = (torch.from_numpy(sample[name])[None] for name in ("image", "mask"))
        codes = vision.encode_mask(mask)[0]
        images = vision.encode_image(image)[0] if front_end == "both" else None
        ids, labels = sequence.build(encode_text(collator.text, sample["text"]), images, codes)
        assert batch["input_ids"][row, : len(ids)].tolist() == ids.tolist()
        assert (batch["input_ids"][row, len(ids) :] == sequence.vocabulary.pad).all()
        assert batch["labels"][row, : len(labels)].tolist() == labels.tolist()
        assert (
            batch["labels"][row][batch["grid_ids"][row] > sequence.image_cells] - low
        ).tolist() == codes.ravel().tolist()
    assert torch.equal(batch["grid_ids"], torch.from_numpy(sequence.grid_ids(batch["input_ids"].numpy())))


def test_features_that_are_not_aligned_stand_on_one_code(cache) -> None:
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.tokenizers.vocabulary import Vocabulary
    from ntpseg.training.pixel_dataset import PixelCollator

    text = make_parts()[1].text
    sequence = SequenceFormat(Vocabulary(len(text), 1, 16), GRID, GRID)
    batch = PixelCollator(sequence, text, Quadrants(), image_tokens=False)([PixelDataset(cache)[0]])
    low, high = sequence.vocabulary.image_range
    assert int(((batch["input_ids"] >= low) & (batch["input_ids"] < high)).sum()) == GRID[0] * GRID[1]


def test_workers_read_the_same(cache) -> None:
    """Started anew, so that data set and collator are pickled; the cache goes as a path."""
    _, collator = make_parts()
    dataset = PixelDataset(cache, AUGMENTATION, seed=2)
    dataset.set_epoch(3)
    assert len(pickle.dumps(dataset)) < 2000
    loader = DataLoader(dataset, 3, collate_fn=collator, num_workers=1, multiprocessing_context="spawn")
    for start, batch in zip((0, 3), loader, strict=True):
        here = collator([dataset[start + i] for i in range(3)])
        for name, value in here.items():
            assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), name


def test_the_toys_tokenizer_is_one() -> None:
    codes = torch.arange(16)[:9].view(1, 3, 3)
    assert torch.equal(Quadrants().encode_mask(Quadrants().decode_mask(codes)), codes)
    assert Quadrants().mask_patches().shape == (16, FACTOR, FACTOR)
