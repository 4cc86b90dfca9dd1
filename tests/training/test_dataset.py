from __future__ import annotations

import pickle

import numpy as np
import torch
from toy import make_toy, sequence_of

from ntpseg.training import Collator, TokenDataset
from ntpseg.training.dataset import EpochSampler, ignore_padding


def test_variants_depend_on_seed_epoch_and_index_alone() -> None:
    toy = make_toy(40, variants=3)
    data = TokenDataset(toy, sequence_of(toy), seed=1)
    first = [data.variant(i) for i in range(40)]
    data.set_epoch(1)
    second = [data.variant(i) for i in range(40)]
    data.set_epoch(0)
    assert [data.variant(i) for i in reversed(range(40))] == first[::-1]
    assert first != second and set(first) == {0, 1, 2, 3}
    assert first != [TokenDataset(toy, sequence_of(toy), seed=2).variant(i) for i in range(40)]
    assert {TokenDataset(toy, sequence_of(toy), augmented=False).variant(i) for i in range(40)} == {0}


def test_item_is_the_chosen_variant() -> None:
    toy = make_toy(6, variants=2)
    sequence = sequence_of(toy)
    data = TokenDataset(toy, sequence)
    for index in range(6):
        variant = data.variant(index)
        item = data[index]
        ids, labels = sequence.build(
            list(toy.texts[index][variant].encode()), toy.image_codes[index, variant], toy.mask_codes[index, variant]
        )
        np.testing.assert_array_equal(item["input_ids"], ids)
        np.testing.assert_array_equal(item["labels"], labels)
        assert item["sample_ids"] == index


def test_batch() -> None:
    toy = make_toy(4)
    sequence = sequence_of(toy)
    data = TokenDataset(toy, sequence)
    batch = Collator(sequence)([data[i] for i in range(4)])
    longest = max(len(data[i]["input_ids"]) for i in range(4))
    for name in ("input_ids", "labels", "grid_ids"):
        assert batch[name].shape == (4, longest) and batch[name].dtype == torch.int64
    assert batch["sample_ids"].tolist() == [0, 1, 2, 3]
    supervised = batch["labels"] != -100
    assert not supervised[:, : batch["loss_start"]].any() and supervised[:, batch["loss_start"]].any()
    for row in range(4):
        size = len(data[row]["input_ids"])
        assert (batch["input_ids"][row, size:] == sequence.vocabulary.pad).all()
        assert not supervised[row, size:].any() and not batch["grid_ids"][row, size:].any()
        np.testing.assert_array_equal(batch["grid_ids"][row, :size], sequence.grid_ids(data[row]["input_ids"]))
    assert "grid_ids" not in Collator(sequence, grid_ids=False)([data[0]])


def test_sampler_is_a_permutation_of_its_epoch() -> None:
    toy = make_toy(20)
    data = TokenDataset(toy, sequence_of(toy), seed=5)
    sampler = EpochSampler(data)
    first = list(sampler)
    assert sorted(first) == list(range(20)) == sorted(set(first)) and list(sampler) == first
    data.set_epoch(1)
    assert list(sampler) != first


def test_padding_fills_up_and_counts_nothing() -> None:
    toy = make_toy(5)
    data = TokenDataset(toy, sequence_of(toy), seed=1)
    sampler = EpochSampler(data, 4)
    indices = list(sampler)
    assert len(sampler) == len(indices) == 8
    assert sorted(indices[:5]) == list(range(5)) and indices[5:] == indices[:3]
    assert [index.padding for index in indices] == [False] * 5 + [True] * 3
    assert [index.padding for index in EpochSampler(data)] == [False] * 5
    assert list(EpochSampler(data, shuffle=False)) == list(range(5))
    few = list(EpochSampler(TokenDataset(make_toy(1), sequence_of(toy)), 4))
    assert few == [0] * 4 and [index.padding for index in few] == [False, True, True, True]
    assert [index.padding for index in pickle.loads(pickle.dumps(indices))] == [index.padding for index in indices]
    batch = Collator(sequence_of(toy))(data.__getitems__(indices[4:]))
    assert (batch["sample_ids"] < 0).tolist() == [False, True, True, True]
    before = batch["labels"].clone()
    ignore_padding(batch)
    assert batch["sample_ids"].tolist() == indices[4:]
    assert torch.equal(batch["labels"][0], before[0]) and (batch["labels"][1:] == -100).all()
