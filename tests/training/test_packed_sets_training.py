"""Packed data sets in training: each pair once for any ranks and workers, resumed anywhere, to a folder's losses."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader

from ntpseg.data import Augmentation
from ntpseg.data.shards import ShardError, open_packed
from ntpseg.data.shards.writing import PackOptions, pack_dataset
from ntpseg.tokenizers.compact import CompactVQOptions
from ntpseg.tokenizers.compact_training import train_compact_vq
from ntpseg.tokenizers.pack_tokens import PackTokenizer
from ntpseg.tokenizers.packed import PackedPixels, PackedTokens
from ntpseg.tokenizers.pixel_cache import PixelCache
from ntpseg.tokenizers.preprocess import stack_pairs
from ntpseg.tokenizers.text import train_text_tokenizer
from ntpseg.training import load_config, train
from ntpseg.training.dataset import EpochSampler, TokenDataset
from ntpseg.training.pixel_dataset import PixelDataset
from ntpseg.training.preparation import prepare_run
from ntpseg.utils.files import write_csv

pytest.importorskip("pyarrow")
PAIRS, SIDE, BATCH = 29, 24, 3


def write_folder(path: Path, pairs: int = PAIRS) -> Path:
    """`pairs` for training, and four for validation."""
    rng, rows = np.random.default_rng(0), []
    for i in range(pairs + 4):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[2 + i % 9 : 12 + i % 9, 4:14] = 255
        pixels = rng.integers(0, 60, (SIDE, SIDE)).astype(np.uint8) + mask // 2
        for kind, array in (("img", pixels), ("lab", mask)):
            (path / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path / kind / f"p{i}.png")
        rows.append([f"img/p{i}.png", f"lab/p{i}.png", f"Square {i % 3}.", "train" if i < pairs else "val", f"s{i}"])
    write_csv(path / "manifest.csv", ["image", "mask", "text", "split", "subject"], rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "set"
    pack_dataset(folder, out, PackOptions(shard_bytes=4000))
    assert len(open_packed(out).manifest.splits["train"].shards) > 3
    return out


def pixels(path: Path, **options: object) -> PixelDataset:
    return PixelDataset(PackedPixels(open_packed(path).splits["train"], 16, 1), seed=5, **options)  # type: ignore[arg-type]


def ids(samples: list[dict]) -> list[int]:
    return [sample["sample_ids"] for sample in samples]


def loaders(dataset: PixelDataset, ranks: int, workers: int, epoch: int, skip: int = 0) -> list:
    """What the Trainer makes of a data set on each rank, where a run goes on after `skip` of an epoch's batches."""
    sampler = EpochSampler(dataset, BATCH * ranks)
    plain = DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, collate_fn=ids)
    made = []
    for rank in range(ranks):
        options = {"num_processes": ranks, "process_index": rank, "split_batches": False, "put_on_device": False}
        loader = prepare_data_loader(plain, **options)
        loader = skip_first_batches(loader, skip) if skip else loader
        loader.iteration = epoch  # what a loader tells its data set
        made.append(loader)
    return made


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_pair_is_lost_or_seen_twice(shards: Path, ranks: int, workers: int) -> None:
    dataset = pixels(shards)
    dataset.set_epoch(1)
    order = [int(i) for i in EpochSampler(dataset)]
    assert order != list(range(PAIRS)) and sorted(order) == list(range(PAIRS))
    read = [list(loader) for loader in loaders(pixels(shards), ranks, workers, epoch=1)]
    assert len({len(batches) for batches in read}) == 1
    # Batch after batch the ranks together go through the one order; what fills up the last has negative numbers.
    together = [i for batches in zip(*read) for batch in batches for i in batch]
    assert [i for i in together if i >= 0] == order
    assert len(together) - PAIRS == -PAIRS % (BATCH * ranks)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2), (3, 0)])
def test_a_run_goes_on_in_the_middle_of_a_shard_by_its_step_alone(shards: Path, ranks: int, workers: int) -> None:
    steps = 2
    for rank in range(ranks):
        whole = list(loaders(pixels(shards), ranks, workers, epoch=2)[rank])
        again = pixels(shards)
        reads: list = []
        split = again.cache.split  # type: ignore[attr-defined]
        split._fetch = lambda keys, fetch=split._fetch, reads=reads: reads.extend(keys) or fetch(keys)
        rest = list(loaders(again, ranks, workers, epoch=2, skip=steps)[rank])
        assert rest == whole[steps:]
        if not workers:
            # Nothing is read of what was trained on already.
            wanted = {i if i >= 0 else -1 - i for batch in rest for i in batch}
            assert {row for row, _ in reads} == wanted


def test_order_depends_on_seed_and_epoch_not_on_shards(folder: Path, shards: Path, tmp_path: Path) -> None:
    pack_dataset(folder, tmp_path / "tar", PackOptions("webdataset", shard_bytes=10**9))
    orders = {}
    for path in (shards, tmp_path / "tar"):
        dataset = pixels(path)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            orders[path, epoch] = [int(i) for i in EpochSampler(dataset)]
    assert orders[shards, 0] == orders[tmp_path / "tar", 0] != orders[shards, 1] == orders[tmp_path / "tar", 1]


def test_pixels_are_those_of_a_pixel_cache(folder: Path, shards: Path, tmp_path: Path) -> None:
    split = open_packed(shards).splits["train"]
    for size, channels in ((16, 1), (32, 3)):
        cache, packed = PixelCache.build(tmp_path, split, size, channels), PackedPixels(split, size, channels)
        assert len(cache) == len(packed) and cache.text(3) == packed.text(3)
        for index in range(len(cache)):
            for one, other in zip(cache.pair(index)[:2], packed.pair(index)[:2]):
                assert one.dtype == other.dtype and np.array_equal(one, other)
    assert PackedPixels(split, 16, 1).key != PackedPixels(split, 16, 3).key
    copy = pickle.loads(pickle.dumps(PackedPixels(split, 16, 1)))
    assert copy.key == PackedPixels(split, 16, 1).key and copy.pair(4).text == split.text(4)


def test_workers_of_any_start_read_and_tell_damage_in_one_line(shards: Path, tmp_path: Path) -> None:
    split = open_packed(shards)
    assert isinstance(split.splits["train"], type(pickle.loads(pickle.dumps(split.splits["train"]))))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in shards.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    name = split.manifest.splits["train"].shards[2].name
    content = bytearray((broken / name).read_bytes())
    content[content.index(b"IDAT") + 12] ^= 1
    (broken / name).write_bytes(bytes(content))
    augmentation = Augmentation(flip=0.5)
    for method in multiprocessing.get_all_start_methods()[:1]:
        dataset = pixels(broken, augmentation=augmentation)
        loader = DataLoader(dataset, 4, num_workers=1, collate_fn=ids, multiprocessing_context=method)
        with pytest.raises(ShardError) as caught:
            list(loader)
        assert str(caught.value).startswith("record '") or str(caught.value).startswith(str(broken))
        assert "\n" not in str(caught.value) and f"{name} must be what was packed" in str(caught.value)


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """Noise of 30 MB read once; a process may keep 8 MB of what it read, here."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (1000, 1000)).astype(np.uint8)).save(tmp_path / f"{i}.bmp")
        mask = np.zeros((1000, 1000), np.uint8)
        mask[:500] = 255
        Image.fromarray(mask).save(tmp_path / f"m{i}.png")
        rows.append([f"{i}.bmp", f"m{i}.png", f"Noise {i}.", "train"])
    write_csv(tmp_path / "manifest.csv", ["image", "mask", "text", "split"], rows)
    pack_dataset(tmp_path, tmp_path / "set", PackOptions(shard_bytes=10**7))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        held, grown = pool.apply(_read_all, (tmp_path / "set",))
    assert held <= 2**23 and grown < 16 * 2**20


def _read_all(path: Path) -> tuple[int, int]:
    from ntpseg.data.shards import reading

    reading._RECENT = 2**23
    split = open_packed(path).splits["train"]
    split.read(0, "image")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for row in range(len(split)):
        split.read(row, "image")
    unit = 1 if sys.platform == "darwin" else 1024
    return split._process.get().size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def losses(run: Path) -> list[tuple]:
    lines = map(json.loads, (run / "trainer_log.jsonl").read_text().splitlines())
    found = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    return [row for row in found if row[1:] != (None, None)]


FAST = [
    "data.size=16",
    "data.variants=0",
    "data.augment={}",
    "data.mask_noise=0",
    "vision={factor: 4, image_codes: 16, mask_codes: 8, steps: 4, codebook_steps: 2, width: 8}",
    "text.vocab_size=280",
    "model.overrides={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 2, head_dim: 16}",
    "training.per_device_train_batch_size=8",
    "training.num_train_epochs=2",
    "training.logging_steps=1",
    "training.save_strategy=no",
    "training.bf16=false",
]


def run(data: object, output: Path, *more: str) -> Path:
    return train(load_config("tiny", [f"data.path={data}", f"output={output}", *FAST, *more]), progress=False)


def test_training_on_tokens_of_shards_is_that_on_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(folder, tmp_path / "a")
    pack_dataset(folder, tmp_path / "set", tokenizer=PackTokenizer.load(plain))
    packed = run(tmp_path / "set", tmp_path / "b")
    assert losses(packed) == losses(plain) and len(losses(plain)) > 8
    assert not (packed / "cache").exists() and "the tokenizers are those of" in capsys.readouterr().err
    config = load_config(packed)
    prepared = prepare_run(config, packed, progress=False)
    assert isinstance(prepared.training, PackedTokens) and isinstance(prepared.validation, PackedTokens)
    assert TokenDataset(prepared.training, prepared.sequence)[0]["labels"].shape
    # The same without tokens: made once, as of a folder.
    pack_dataset(folder, tmp_path / "bare")
    assert losses(run(tmp_path / "bare", tmp_path / "c")) == losses(plain)
    with pytest.raises(ValueError, match=r"data.size and data.channels must be 16 and 1, .* got 32 and 1"):
        run(tmp_path / "set", tmp_path / "d", "data.size=32")
    # Tokenizers that are not what was packed, though of the same size, would read its tokens wrongly.
    weights = tmp_path / "set" / "tokenizers" / "vision" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    message = r"set/tokenizers must be what was packed, got a folder where vision/model.safetensors is not what was"
    with pytest.raises(ShardError, match=message) as caught:
        run(tmp_path / "set", tmp_path / "e")
    assert "\n" not in str(caught.value)


def test_tokenizers_of_a_url_are_copied_and_checked(folder: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    plain = run(folder, tmp_path / "run", "training.max_steps=1")
    for name in ("whole", "damaged"):
        pack_dataset(folder, f"memory://tokenizers/{name}", tokenizer=PackTokenizer.load(plain))
    memory = fsspec.filesystem("memory")
    try:
        copy = open_packed("memory://tokenizers/whole").tokenizers()
        names = ("vision/model.safetensors", "text/tokenizer.json")
        assert all((copy / n).read_bytes() == (plain / "tokenizers" / n).read_bytes() for n in names)
        path = f"/tokenizers/damaged/tokenizers/{names[0]}"
        memory.pipe_file(path, bytes(len(memory.cat_file(path))))
        message = f"memory://tokenizers/damaged/tokenizers must be what was packed, got a folder where {names[0]}"
        with pytest.raises(ShardError, match=message):
            open_packed("memory://tokenizers/damaged").tokenizers()
    finally:
        memory.store.clear()


def test_a_batch_is_announced_in_one_go(shards: Path, folder: Path, tmp_path: Path) -> None:
    plain = run(folder, tmp_path / "run", "training.max_steps=1")
    pack_dataset(folder, tmp_path / "set", tokenizer=PackTokenizer.load(plain))
    found = open_packed(tmp_path / "set")
    assert found.manifest.tokens is not None
    tokens = PackedTokens(found.splits["train"], found.manifest.tokens)
    sequence = prepare_run(load_config(plain), plain, progress=False).sequence
    for dataset in (pixels(shards), TokenDataset(tokens, sequence)):
        split, calls = dataset.cache.split, []  # type: ignore[attr-defined]
        split._fetch = lambda keys, fetch=split._fetch, calls=calls: calls.append(len(keys)) or fetch(keys)
        assert len(dataset.__getitems__([4, 9, 2])) == 3
        assert calls == [6 if isinstance(dataset, PixelDataset) else 3]


def test_a_class_of_label_maps_is_that_of_packing(shards: Path, tmp_path: Path) -> None:
    message = r"data.mask_value must be empty for the packed set .*, got '255'; pack with --mask-value 255"
    with pytest.raises(ValueError, match=message) as caught:
        run(shards, tmp_path / "run", "data.mask_value='255'")
    assert "\n" not in str(caught.value)


def test_a_run_refuses_other_pairs_and_empty_masks(folder: Path, shards: Path, tmp_path: Path) -> None:
    done = run(shards, tmp_path / "run", "training.max_steps=1")
    config = load_config(done)
    other = tmp_path / "set"
    pack_dataset(write_folder(tmp_path / "more", PAIRS + 1), other)
    from ntpseg.training.same_data import check_same_data

    check_same_data(config, done)
    config.data.path = str(other)
    with pytest.raises(ValueError, match="resume must find the data that the run was made from") as caught:
        check_same_data(config, done)
    assert "\n" not in str(caught.value)
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(tmp_path / "more" / "lab" / "p0.png")
    from ntpseg.data import MaskOptions

    pack_dataset(tmp_path / "more", tmp_path / "empty", PackOptions(masks=MaskOptions(keep_empty=True)))
    with pytest.raises(ValueError, match=r"data.keep_empty must be true for .*, of which 1 pairs hold no finding"):
        run(tmp_path / "empty", tmp_path / "x")
    sampled = load_config("tiny", [f"data.path={tmp_path / 'empty'}", f"output={tmp_path / 'y'}", *FAST])
    sampled.data.keep_empty, sampled.data.empty_share = True, 0.0
    prepared = prepare_run(sampled, tmp_path / "y", progress=False)
    assert prepared.sampling is not None and len(prepared.sampling) == PAIRS


def test_vision_is_trained_on_shards_as_on_files(folder: Path, shards: Path) -> None:
    from ntpseg.data import load_records

    options = CompactVQOptions(factor=4, image_codes=16, mask_codes=8, steps=3, codebook_steps=1, width=8)
    made = []
    for records in ([r for r in load_records(folder) if r.split == "train"], open_packed(shards).splits["train"]):
        images, masks = stack_pairs(records, 16, 1, limit=20, progress=False)
        made.append(train_compact_vq(images, masks, options, progress=False).fingerprint())
    assert made[0] == made[1] and torch.is_tensor(images)
    of_masks = CompactVQOptions(factor=4, image_codes=0, mask_codes=8, steps=1)
    bare = train_compact_vq(images, masks, of_masks, progress=False)
    with pytest.raises(ValueError, match="--tokenizers must have codes for images"):
        PackTokenizer(bare, train_text_tokenizer(["a"], 280))
