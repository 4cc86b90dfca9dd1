"""The pixel cache: exact content, keyed by content, whole or absent."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ntpseg.data import Record, prepare, read_image, read_mask
from ntpseg.tokenizers import pixel_cache as module
from ntpseg.tokenizers.pixel_cache import PixelCache
from ntpseg.utils.files import TEMPORARY_FOLDER, remove_stale_folders

COUNT = 5


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Five records of 40 x 30 colour pixels."""
    rng, made = np.random.default_rng(0), []
    for i in range(COUNT):
        paths = tmp_path / f"i{i}.png", tmp_path / f"m{i}.png"
        Image.fromarray(rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)).save(paths[0])
        Image.fromarray(255 * (rng.random((40, 30)) < 0.5).astype(np.uint8)).save(paths[1])
        made.append(Record(*paths, f"Läsion {i}.", "train", f"c{i}", f"s{i}"))
    return made


def build(folder: Path, records: list[Record], size: int = 20, channels: int = 1) -> PixelCache:
    return PixelCache.build(folder, records, size, channels, progress=False)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [20, 13])
def test_round_trip_is_exact(tmp_path, records, size, channels) -> None:
    """To the bit what `prepare` gives, also where a mask's bits do not fill their last byte."""
    cache = build(tmp_path / "cache", records, size, channels)
    assert len(cache) == COUNT
    assert cache.images.dtype == np.uint8 and isinstance(cache.images, np.memmap)
    for index, record in enumerate(records):
        image, mask = prepare(read_image(record.image), read_mask(record.mask), size, channels)
        pair = cache.pair(index)
        assert pair.image.dtype == pair.mask.dtype == np.float32
        np.testing.assert_array_equal(pair.image, image)
        np.testing.assert_array_equal(pair.mask, mask)
        assert pair.text == record.text


def test_the_key_follows_the_content(tmp_path, records, monkeypatch) -> None:
    root = tmp_path / "cache"
    first = build(root, records)

    def fail(*arguments):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", fail)
        assert build(root, records).key == first.key
        moved = records[0].image.rename(tmp_path / "elsewhere.png")
        assert build(root, [replace(records[0], image=moved), *records[1:]]).key == first.key
        moved.rename(records[0].image)
    keys = {first.key, build(root, records, 24).key, build(root, records, 20, 3).key, build(root, records[::-1]).key}
    keys.add(build(root, [replace(records[0], text="other"), *records[1:]]).key)
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(records[0].mask)
    keys.add(build(root, records).key)
    assert len(keys) == 6 and {p.name for p in root.iterdir()} == keys


@pytest.mark.parametrize("damage", ["truncate", "remove", "meta"])
def test_damage_is_told_and_mended(tmp_path, records, damage) -> None:
    root = tmp_path / "cache"
    cache = build(root, records)
    good, path = np.array(cache.images), root / cache.key
    if damage == "truncate":
        (path / "masks.npy").write_bytes((path / "masks.npy").read_bytes()[:-1])
    elif damage == "remove":
        (path / "texts.json").unlink()
    else:
        (path / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="must be complete, got a damaged one"):
        PixelCache.open(root, cache.key)
    np.testing.assert_array_equal(build(root, records).images, good)
    assert [p.name for p in root.iterdir()] == [cache.key]


KILLED = """
import sys, time
from pathlib import Path
from ntpseg.data import Record
from ntpseg.tokenizers import pixel_cache
root = Path(sys.argv[1])
records = [Record(root / f"i{i}.png", root / f"m{i}.png", f"Läsion {i}.", "train", f"c{i}", f"s{i}") for i in range(5)]
read = pixel_cache.preprocess
def slow(record, *options):
    if record.case == "c3":
        print("reading", flush=True)
        time.sleep(60)
    return read(record, *options)
pixel_cache.preprocess = slow
pixel_cache.PixelCache.build(root / "cache", records, 20, 1, progress=False)
"""


def test_a_killed_build_leaves_nothing_that_opens(tmp_path, records) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None and process.stdout.readline() == b"reading\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert [p.name.startswith(".building-") for p in (tmp_path / "cache").iterdir()] == [True]
    cache = build(tmp_path / "cache", records)
    image, _ = prepare(read_image(records[4].image), None, 20, 1)
    np.testing.assert_array_equal(cache.pair(4).image, image)


def test_an_error_leaves_no_folder(tmp_path, records) -> None:
    records[3].image.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"'c3' must have readable files, got: .*i3.png"):
        build(tmp_path / "cache", records)
    assert list((tmp_path / "cache").iterdir()) == []


def test_it_pickles_as_a_path(tmp_path, records) -> None:
    cache = build(tmp_path / "cache", records)
    data = pickle.dumps(cache)
    assert len(data) < 500
    again = pickle.loads(data)
    np.testing.assert_array_equal(again.images, cache.images)
    assert again.texts == cache.texts


def test_wrong_input_is_named(tmp_path, records) -> None:
    with pytest.raises(ValueError, match="records must hold"):
        build(tmp_path / "cache", [])
    with pytest.raises(ValueError, match="must all have a mask, got 1 without one: 'c2'"):
        build(tmp_path / "cache", [*records[:2], replace(records[2], mask=None)])
    with pytest.raises(ValueError, match=r"key must be that of a cache in .* got 'abc'"):
        PixelCache.open(tmp_path, "abc")


def test_a_build_of_more_than_a_day_is_not_litter(tmp_path, records, monkeypatch) -> None:
    """Another run that looks at the same folder of caches leaves one alone that is being written to."""

    def slow(function, items):
        for item in items:
            (building,) = root.glob(f"{TEMPORARY_FOLDER}*")
            remove_stale_folders(root)
            assert building.is_dir()
            os.utime(building, (0, 0))
            yield function(item)

    root = tmp_path / "cache"
    monkeypatch.setattr(module, "parallel_map", slow)
    monkeypatch.setattr(module, "_TOUCH_EVERY", 1)
    assert len(build(root, records)) == COUNT
