"""Epochs with a bounded share of empty slices, and of each volume not too many pairs."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pipeline import FAST, write_data
from toy import make_toy, sequence_of

from ntpseg.data import SlicePlace, load_records
from ntpseg.evaluation.run_directory import training_log
from ntpseg.tokenizers.cache_folder import content_key
from ntpseg.training import TokenDataset, load_config, pipeline, train
from ntpseg.training.callbacks import JsonLog
from ntpseg.training.dataset import EpochSampler
from ntpseg.training.pipeline import make_datasets
from ntpseg.training.preparation import prepare_run
from ntpseg.training.same_data import _row, check_same_data
from ntpseg.training.sampling import SAMPLING, SamplingOptions, SliceSampling


def made(empties: int, filled: int, share: float | None, volumes: int = 0, most: int | None = None) -> SliceSampling:
    """Empty pairs first; the pairs are dealt to the volumes in turn."""
    count = empties + filled
    names = [f"v{n % volumes}" if volumes else "" for n in range(count)]
    return SliceSampling([n < empties for n in range(count)], names, SamplingOptions(share, most))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 3), (0.25, 10), (0.5, 30), (0.9, 40), (None, 40)])
def test_share_of_empty_pairs(share: float | None, expected: int) -> None:
    """Of 30 pairs with foreground all come in each epoch; of 40 without as many as the share allows, none twice."""
    sampling = made(40, 30, share)
    assert (sampling.with_foreground, sampling.without_foreground) == (30, expected)
    for epoch in range(5):
        order = sampling.order(3, epoch)
        assert len(order) == len(sampling) == len(set(order)) == 30 + expected
        assert sum(n < 40 for n in order) == expected and {n for n in order if n >= 40} == set(range(40, 70))


def test_every_empty_pair_comes_equally_often() -> None:
    sampling = made(40, 30, 0.25)
    counts = Counter(n for epoch in range(8) for n in sampling.order(0, epoch) if n < 40)
    assert counts == dict.fromkeys(range(40), 2)


def test_a_batch_has_about_the_share_of_the_epoch() -> None:
    sampling = made(100, 60, 0.25)
    order = sampling.order(0, 4)
    for start in range(0, 80, 8):
        assert 1 <= sum(n < 100 for n in order[start : start + 8]) <= 3


def test_volumes_count_alike() -> None:
    """Three volumes of 20, 10 and 5 pairs, and two images of no volume."""
    names = ["a"] * 20 + ["b"] * 10 + ["c"] * 5 + ["", ""]
    sampling = SliceSampling(np.zeros(37, bool), names, SamplingOptions(pairs_per_volume=5))
    counts: Counter[int] = Counter()
    for epoch in range(4):
        order = sampling.order(1, epoch)
        assert Counter(names[n] for n in order) == {"a": 5, "b": 5, "c": 5, "": 2}
        assert len(set(order)) == len(order) == len(sampling)
        counts.update(order)
    assert {counts[n] for n in range(20)} == {1} and {counts[n] for n in range(20, 30)} == {2}


def test_volumes_and_share_together() -> None:
    sampling = made(60, 20, 0.25, volumes=4, most=4)
    for epoch in range(3):
        order = sampling.order(0, epoch)
        assert Counter(n % 4 for n in order) == dict.fromkeys(range(4), 4)
        assert sum(n < 60 for n in order) == 4


def test_epochs_depend_on_seed_and_epoch_alone() -> None:
    first, second = made(40, 30, 0.25), made(40, 30, 0.25)
    assert first.order(1, 2) == second.order(1, 2)
    assert first.order(1, 2) != first.order(1, 3)
    assert sorted(first.order(1, 2)) != sorted(first.order(1, 3)) != sorted(first.order(2, 3))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_divide_the_same_epoch(world: int) -> None:
    """As the Trainer divides it: batches in turn, the last ones filled up with padding that counts nothing."""
    toy = make_toy(30)
    data = TokenDataset(toy, sequence_of(toy), seed=5)
    data.sampling = made(20, 10, 0.3)
    sampler = EpochSampler(data, 4 * world if world > 1 else 1)
    data.set_epoch(2)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    batches = [indices[n : n + 4] for n in range(0, len(indices), 4)]
    ranks = [batches[rank::world] for rank in range(world)]
    real = [int(i) for step in zip(*ranks) for batch in step for i in batch if not i.padding] if world > 1 else None
    expected = data.sampling.order(5, 2)
    assert (real or [int(i) for i in indices]) == expected and len(expected) == 14
    # Going on in the middle of the epoch, as a resumed run does.
    assert list(islice(iter(sampler), 8, None)) == indices[8:]
    assert list(EpochSampler(data, shuffle=False)) == list(range(30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty_share": 1.0}, "data.empty_share must be a number >= 0 and < 1, got 1.0"),
        ({"empty_share": -0.1}, "data.empty_share must be a number >= 0 and < 1, got -0.1"),
        ({"pairs_per_volume": 0}, "data.pairs_per_volume must be an integer >= 1, got 0"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)
    with pytest.raises(ValueError, match=message):
        load_config("tiny", ["data.keep_empty=true", *(f"data.{name}={value}" for name, value in options.items())])


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.empty_share must leave a pair to train on, got 0\.2 with 4"):
        made(4, 0, 0.2)
    with pytest.raises(ValueError, match=r"data\.pairs_per_volume must be null for a data set whose table has no"):
        made(2, 4, None, most=3)
    with pytest.raises(ValueError, match=r"data\.empty_share must be null without data\.keep_empty=true"):
        load_config("tiny", ["data.empty_share=0.2"])


def volume_data(folder: Path) -> Path:
    """Twelve training slices of two volumes, eight of them empty; two for validation."""
    write_data(folder, 12, 2)
    lines = (folder / "manifest.csv").read_text().splitlines()
    rows = [lines[0] + ",volume,axis,slice"]
    for n, line in enumerate(lines[1:]):
        if n < 8:
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / f"m{n}.png")
        rows.append(f"{line},v{n % 2 if n < 12 else n},axial,{n}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def config(folder: Path, *more: str):
    options = ["data.keep_empty=true", "data.empty_share=0.5", *FAST, *more]
    return load_config("tiny", [f"data.path={folder / 'data'}", f"output={folder / 'run'}", *options])


def test_a_run_keeps_its_sampling(tmp_path: Path, capsys) -> None:
    volume_data(tmp_path / "data")
    settings, run = config(tmp_path), tmp_path / "run"
    run.mkdir()
    prepared = prepare_run(settings, run, progress=True)
    assert "each epoch has 4 of 4 pairs with foreground and 4 of 8 without" in capsys.readouterr().err
    assert prepared.sampling is not None and prepared.sampling.volumes == 2
    assert prepared.sampling.empty.tolist() == [True] * 8 + [False] * 4
    again = make_datasets(settings, prepare_run(settings, run, progress=False)).training
    assert again.sampling is not None and again.sampling.order(0, 3) == prepared.sampling.order(0, 3)
    # Millimetres, added to the table later, are no other data.
    table = tmp_path / "data" / "manifest.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{header},row_mm,column_mm", *(f"{row},1,1" for row in rows)]) + "\n")
    check_same_data(settings, run)
    (run / SAMPLING).write_text('{"empty": [1]}')
    with pytest.raises(ValueError, match=r"sampling\.json must say which pairs have no foreground, got a damaged file"):
        prepare_run(settings, run, progress=False)


def test_places_are_in_no_key(tmp_path: Path) -> None:
    """Caches and runs of releases without these columns stay valid, and of tables that get them later."""
    data = write_data(tmp_path / "data", 2, 1)
    records = load_records(data)
    placed = [replace(r, place=SlicePlace(f"v{n}", "axial", n, row_mm=0.5)) for n, r in enumerate(records)]
    assert content_key({"kind": "test"}, placed) == content_key({"kind": "test"}, records)
    rows = [_row(record) for record in records]
    assert {row["other"] for row in rows} == {hashlib.sha256(b'{"mask_value": ""}').hexdigest()[:32]}
    assert [_row(record) for record in placed] == rows


def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are those of the unbroken run: two steps an epoch, cut off after the first half of the second."""
    more = ("training.num_train_epochs=3", "training.save_strategy=steps", "training.save_steps=3")
    volume_data(tmp_path / "data")
    settings = config(tmp_path, *more)
    train(config(tmp_path, *more, f"output={tmp_path / 'whole'}"), progress=False)

    class Cut(JsonLog):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 4:
                raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(pipeline, "JsonLog", Cut)
        train(settings, progress=False)
    train(settings, resume=True, progress=False)
    lines = [
        [(line["step"], line["loss"]) for line in training_log(tmp_path / name) if "loss" in line]
        for name in ("whole", "run")
    ]
    assert [step for step, _ in lines[0]] == [1, 2, 3, 4, 5, 6]
    assert lines[1] == lines[0]
