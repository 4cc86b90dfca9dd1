"""Packing: what is written, that it is the same pairs, who else can read it, and what damage is called."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from dataset_files import picture, save, square, table
from packed_files import damage, folder_of, packed, same
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.data import MaskOptions, check_records, load_records, read_image, read_truth
from ntpseg.data.shards import PackedSplit, ShardError, open_packed, reading, storage
from ntpseg.data.shards.storage import MAX_OPEN, LocalStorage, dataset_url
from ntpseg.data.shards.writing import PackOptions, pack_dataset

pytest.importorskip("pyarrow")
FORMATS = ("parquet", "webdataset")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_pairs_are_those_of_the_folder(tmp_path: Path, kind: str) -> None:
    out = packed(tmp_path, format=kind)
    before, after = load_records(tmp_path / "folder"), load_records(out)
    fields = ("text", "split", "case", "subject", "mask_value", "place")
    assert [[getattr(r, f) for f in fields] for r in after] == [[getattr(r, f) for f in fields] for r in before]
    for old, new in zip(before, after):
        assert same(read_image(old.image), read_image(new.image)) and same(read_truth(old), read_truth(new))
        assert new.image != new.mask and new.image.name == old.image.name
        assert new.image.read_bytes() == old.image.read_bytes()
        assert new.image.stat().st_size == old.image.stat().st_size
        assert pickle.loads(pickle.dumps(new.mask)).read_bytes() == old.mask.read_bytes()
        with open(new.image, "rb") as copy:  # what takes names of files alone
            assert copy.read() == old.image.read_bytes()
        # As tables of results show it.
        assert same(read_image(str(new.image)), read_image(old.image))
    assert check_records(out) == []
    splits = open_packed(out).manifest.splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 8, "val": 2, "test": 2}
    assert len(splits["train"].shards) > 2


def test_keys_do_not_depend_on_shards_and_formats(tmp_path: Path) -> None:
    sets = [
        packed(tmp_path / "a"),
        packed(tmp_path / "b", format="webdataset"),
        packed(tmp_path / "c", shard_bytes=10**9),
    ]
    keys = [[split.key for split in open_packed(path).splits.values()] for path in sets]
    assert keys[0] == keys[1] == keys[2] and len(set(keys[0])) == 3
    assert (sets[0] / "packed.json").read_bytes() == (packed(tmp_path / "d") / "packed.json").read_bytes()
    # A packed set is packed anew as any other.
    pack_dataset(sets[0], tmp_path / "again", PackOptions(format="webdataset"))
    assert [split.key for split in open_packed(tmp_path / "again").splits.values()] == keys[0]
    other = packed(tmp_path / "e", pairs=13)
    assert open_packed(other).splits["test"].key != keys[0][2]


@pytest.mark.parametrize("kind", FORMATS)
def test_hugging_face_datasets_reads_the_shards(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    out = packed(tmp_path, format=kind)
    suffix = {"parquet": ".parquet", "webdataset": ".tar"}[kind]
    files = {"train": sorted(str(path) for path in out.glob(f"train-*{suffix}"))}
    rows = list(datasets.load_dataset(kind, data_files=files, streaming=True)["train"])
    names = {"parquet": ("image", "mask", "text"), "webdataset": ("png", "mask.png", "txt")}[kind]
    records = [r for r in load_records(out) if r.split == "train"]
    assert [row[names[2]] for row in rows] == [r.text for r in records]
    for row, record in zip(rows, records):
        assert same(np.asarray(row[names[0]]), read_image(record.image))
        assert same(np.asarray(row[names[1]]) > 0, read_truth(record))


def test_all_shards_of_a_split_declare_the_same_columns(tmp_path: Path) -> None:
    """Pictures alone in the first shards, a medical file in the last: `datasets` reads them as one table or none."""
    nibabel = pytest.importorskip("nibabel")
    import pyarrow.parquet as pq

    folder = folder_of(tmp_path / "folder")
    pixels = np.zeros((16, 16, 1), np.float32)
    pixels[:4] = 100
    nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), folder / "img" / "last.nii.gz")
    lines = (folder / "manifest.csv").read_text().splitlines()
    last = lines[2].replace("p1.png", "last.nii.gz", 1).replace("s1", "s99")
    (folder / "manifest.csv").write_text("\n".join([*lines, last]) + "\n")
    calls: list[tuple[str, int, int]] = []
    pack_dataset(folder, tmp_path / "set", PackOptions(shard_bytes=900), progress=lambda *call: calls.append(call))
    assert calls == [("packing", done + 1, 13) for done in range(13)]
    schemas = [pq.read_schema(path) for path in sorted((tmp_path / "set").glob("train-*.parquet"))]
    assert len(schemas) > 2 and all(schema.equals(schemas[0], check_metadata=True) for schema in schemas)
    assert b'"Image"' not in schemas[0].metadata[b"huggingface"]
    assert b'"Image"' in pq.read_schema(tmp_path / "set" / "val-00000.parquet").metadata[b"huggingface"]


def test_an_image_of_several_sentences_is_stored_once_in_parquet(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(64))
    rows = []
    for i in range(8):
        save(tmp_path / f"m{i}.png", square(64, at=4 + i))
        rows.append({"image": "a.png", "mask": f"m{i}.png", "text": f"The square {i}.", "split": "train"})
    table(tmp_path / "manifest.csv", rows)
    pack_dataset(tmp_path, tmp_path / "set")
    size = (tmp_path / "a.png").stat().st_size
    assert sum(path.stat().st_size for path in (tmp_path / "set").glob("*.parquet")) < 3 * size
    records = load_records(tmp_path / "set")
    assert all(record.image.read_bytes() == (tmp_path / "a.png").read_bytes() for record in records)
    assert len({record.image.stat().st_ino for record in records}) == 1


def test_medical_files_label_maps_places_and_empty_masks_are_packed(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    pixels = picture(16).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(pixels[..., None], np.diag([0.5, 0.7, 2.0, 1.0])), tmp_path / "a.nii.gz")
    labels = np.zeros((16, 16), np.uint8)
    labels[2:6, 2:6], labels[8:12, 8:12] = 1, 2
    nibabel.save(nibabel.Nifti1Image(labels[..., None], np.diag([0.5, 0.7, 2.0, 1.0])), tmp_path / "a_labels.nii.gz")
    row = {
        "image": "a.nii.gz",
        "mask": "a_labels.nii.gz",
        "split": "train",
        "volume": "v",
        "axis": "axial",
        "slice": "3",
    }
    rows = [{**row, "text": f"Class {v}.", "mask_value": v, "window": "lung"} for v in ("1", "2", "3")]
    table(tmp_path / "manifest.csv", rows)
    pack_dataset(tmp_path, tmp_path / "set", PackOptions(masks=MaskOptions(keep_empty=True)))
    before, after = load_records(tmp_path), load_records(tmp_path / "set")
    assert [r.place for r in after] == [r.place for r in before] and after[0].place is not None
    for old, new in zip(before, after):
        assert same(read_image(old.image), read_image(new.image)) and same(read_truth(old), read_truth(new))
    split = open_packed(tmp_path / "set").splits["train"]
    assert split.empty().tolist() == [False, False, True] and split.manifest.empty == 1
    assert split.volumes() == ["v"] * 3 and split.manifest.views == (("axial", "lung"),)


def test_what_cannot_be_packed_is_one_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder")
    (folder / "lab" / "p1.png").write_bytes(b"")
    run = CliRunner().invoke
    result = run(app, ["data", "pack", str(folder), str(tmp_path / "set")])
    assert "1 problem: 1 unreadable file" in str(result.exception) and not (tmp_path / "set").exists()
    result = run(app, ["data", "pack", str(folder), str(tmp_path / "set"), "--skip-bad"])
    assert result.exit_code == 0 and "left out: lab/p1.png" in result.output and "train: 7 pairs" in result.output
    for arguments, message in {
        (str(tmp_path / "set"),): "OUT must be a new or an empty folder",
        (str(tmp_path / "x"), "--format", "zip"): "--format must be one of",
        (str(tmp_path / "x"), "--shard-size", "many"): "--shard-size must be a size such as 64MB",
        (str(tmp_path / "x"), "--tokenizers", str(folder)): "--tokenizers must be a run, or a folder with",
    }.items():
        error = str(run(app, ["data", "pack", str(folder), *arguments]).exception)
        assert message in error and "\n" not in error and not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    out = packed(tmp_path, format=kind)
    manifest = open_packed(out)
    shard = out / manifest.manifest.splits["train"].shards[1].name
    whole = shard.read_bytes()

    def message(read=load_records) -> str:
        with pytest.raises(ShardError) as caught:
            read(out)
        assert "\n" not in str(caught.value) and "copy it again" in str(caught.value)
        return str(caught.value)

    damage(shard)
    assert load_records(out)  # sizes alone are looked at
    assert re.search(rf"{shard.name} must be what was packed, got another SHA-256", message(check_records))
    row = manifest.manifest.splits["train"].shards[0].samples
    assert re.search(
        rf"{shard.name} .* other bytes for the image of case 'p\d+'",
        message(lambda _: manifest.splits["train"].read(row, "image")),
    )
    assert manifest.splits["train"].read(0, "image")
    damage(shard, at=len(whole) - 100)
    assert f"{shard.name} must have {len(whole)} bytes, got {len(whole) - 100} (cut off)" in message()
    shard.unlink()
    assert f"{shard.name} must be a file of the packed data set, got no such file" in message()
    shard.write_bytes(whole)
    index = out / "train.index.arrow"
    index.write_bytes(index.read_bytes()[:-4] + b"abcd")
    assert "train.index.arrow must be what was packed" in message()
    content = json.loads((out / "packed.json").read_text())
    content["splits"]["train"]["shards"][0]["name"] = "../secret"
    (out / "packed.json").write_text(json.dumps(content))
    assert "packed.json must say what was packed" in message() and "../secret" in message()


def test_few_shards_are_open_and_little_is_held(tmp_path: Path) -> None:
    out = packed(tmp_path, pairs=3 * MAX_OPEN, shard_bytes=1)
    split = open_packed(out).splits["train"]
    assert isinstance(split.storage, LocalStorage) and len(split.manifest.shards) == len(split) == 2 * MAX_OPEN
    split.read(0, "image")
    before = len(os.listdir("/proc/self/fd"))
    split._process.get().recent.clear()
    for row in range(len(split)):
        split.read(row, "image")
    assert split.storage.open_files == MAX_OPEN and len(os.listdir("/proc/self/fd")) <= before + MAX_OPEN


@pytest.mark.parametrize("place", ["index", "shard"])
def test_a_forked_loader_reads_while_its_parent_opens_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A thread of the parent holds the lock when the workers are forked, and never lets go of it in them."""
    split = open_packed(packed(tmp_path)).splits["train"]
    expected = [split.read(row, "image") for row in range(len(split))]
    split = open_packed(tmp_path / "set").splits["train"]
    module, name = {"index": (reading, "open_index"), "shard": (storage, "FileIO")}[place]
    original, parent = getattr(module, name), os.getpid()
    holding, free = threading.Event(), threading.Event()

    def slow(*args: object) -> object:
        if os.getpid() == parent:
            holding.set()
            assert free.wait(60)
        return original(*args)

    monkeypatch.setattr(module, name, slow)
    thread = threading.Thread(target=split.read, args=(0, "image"))
    thread.start()
    try:
        assert holding.wait(60)
        images = Images(split)
        context = multiprocessing.get_context("fork")
        loader = DataLoader(images, 2, num_workers=2, collate_fn=list, multiprocessing_context=context, timeout=30)
        assert [image for batch in loader for image in batch] == expected
    finally:
        free.set()
        thread.join()
    assert split.read(0, "image") == expected[0]


class Images(Dataset):
    def __init__(self, split: PackedSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> bytes:
        return self.split.read(row, "image")


def test_a_worker_leaves_the_copies_of_its_parent(tmp_path: Path) -> None:
    split = open_packed(packed(tmp_path, pairs=40)).splits["train"]
    mine = os.fspath(split[0].image)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        theirs = pool.apply(_copies, (split, 20))
        assert Path(mine).read_bytes() == split[0].image.read_bytes()
    assert mine not in theirs and len(set(theirs)) == 20


def _copies(split: PackedSplit, number: int) -> list[str]:
    return [os.fspath(split[row].image) for row in range(number)]


def test_sets_of_earlier_releases_are_read(tmp_path: Path) -> None:
    out = packed(tmp_path)
    content = json.loads((out / "packed.json").read_text())
    (out / "packed.json").write_text(json.dumps({**content, "layout": "manifest"}))
    assert len(load_records(out)) == 12


def test_urls_survive_path_libraries(tmp_path: Path) -> None:
    assert dataset_url("s3://bucket/set/") == dataset_url(Path("s3://bucket/set")) == "s3://bucket/set"
    assert dataset_url("file:///data") is None and dataset_url("C:/data") is None and dataset_url("data/set") is None
    (tmp_path / "s3:" / "set").mkdir(parents=True)
    assert dataset_url(tmp_path / "s3:" / "set") is None
