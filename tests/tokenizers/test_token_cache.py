"""The token cache: right content, keyed by content, whole or absent, one winner of a race."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ntpseg.data import Augmentation, Record, prepare, read_image, read_mask
from ntpseg.tokenizers import cache as module
from ntpseg.tokenizers.cache import TokenCache, cache_key
from ntpseg.tokenizers.preprocess import parallel_map, stack_pairs
from ntpseg.tokenizers.text import encode_text, train_text_tokenizer
from ntpseg.utils.files import TEMPORARY_FOLDER, remove_stale_folders

TEXTS = ["The left lung.", "The right lung.", "Beide Lungenflügel."]
FLIP = Augmentation(flip=1.0, rotate_degrees=0, scale=0, translate=0, brightness=0, contrast=0, gamma=0, noise=0)


@pytest.fixture
def records(tmp_path, ellipses):
    """Seven records of 80 x 64 pixel PNG files."""
    images, masks = ellipses(7, 80)
    made = []
    for i in range(7):
        paths = tmp_path / f"i{i}.png", tmp_path / f"m{i}.png"
        pixels = ((images[i, 0, :, :64] + 1) * 127.5).byte().numpy()
        Image.fromarray(pixels).save(paths[0])
        Image.fromarray(masks[i, 0, :, :64].mul(255).byte().numpy()).save(paths[1])
        made.append(Record(*paths, TEXTS[i % 3], "train", f"c{i}", f"s{i}"))
    return made


@pytest.fixture(scope="module")
def text():
    return train_text_tokenizer(TEXTS * 3)


def test_content_is_that_of_the_tokenizers(tmp_path, records, compact, text):
    cache = TokenCache.build(tmp_path / "cache", records, compact, text, progress=False)
    assert len(cache) == 7
    assert cache.variants == 0
    assert cache.image_codes.shape == cache.mask_codes.shape == (7, 1, 8, 8)
    assert cache.image_codes.dtype == np.uint16
    assert isinstance(cache.image_codes, np.memmap)
    for i, record in enumerate(records):
        image, mask = prepare(read_image(record.image), read_mask(record.mask), 64, 1)
        assert np.array_equal(cache.image_codes[i, 0], compact.encode_image(torch.from_numpy(image)[None])[0])
        assert np.array_equal(cache.mask_codes[i, 0], compact.encode_mask(torch.from_numpy(mask)[None])[0])
        assert cache.texts[i] == [record.text]
        assert cache.text_ids(i) == encode_text(text, record.text)


def test_variants_follow_the_original_with_their_own_sentence(tmp_path, records, compact, text):
    cache = TokenCache.build(
        tmp_path / "cache", records, compact, text, variants=2, augmentation=FLIP, seed=3, progress=False
    )
    plain = TokenCache.build(tmp_path / "cache", records, compact, text, progress=False)
    assert cache.key != plain.key
    assert cache.image_codes.shape == (7, 3, 8, 8)
    assert np.array_equal(cache.image_codes[:, :1], plain.image_codes)
    _, mask = prepare(read_image(records[1].image), read_mask(records[1].mask), 64, 1)
    flipped = compact.encode_mask(torch.from_numpy(mask[:, :, ::-1].copy())[None])[0]
    assert np.array_equal(cache.mask_codes[1, 1], flipped)
    assert cache.texts[1] == ["The right lung.", "The left lung.", "The left lung."]
    assert cache.text_ids(1, 2) == encode_text(text, "The left lung.")


def test_augmentation_is_reproducible_and_differs_between_variants(tmp_path, records, compact, text):
    def build(name, seed):
        return TokenCache.build(
            tmp_path / name, records, compact, text, variants=3, augmentation=Augmentation(), seed=seed, progress=False
        )

    first, again, other = build("a", 0), build("b", 0), build("c", 1)
    assert np.array_equal(first.image_codes, again.image_codes)
    assert np.array_equal(first.mask_codes, again.mask_codes)
    assert not np.array_equal(first.image_codes, other.image_codes)
    assert not np.array_equal(first.image_codes[:, 1], first.image_codes[:, 2])


def test_the_key_is_that_of_the_content(tmp_path, records, compact, text):
    def key(dataset=records, tokenizer=text, **options):
        return cache_key(dataset, compact, tokenizer, **options)

    base = key()
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(records[0].image.read_bytes())
    assert key([replace(records[0], image=moved, case="x"), *records[1:]]) == base
    assert key(augmentation=FLIP, seed=5) == base
    changed = [
        key(records[::-1]),
        key(records[:-1]),
        key([replace(records[0], text="Other."), *records[1:]]),
        key([replace(records[0], image=records[1].image), *records[1:]]),
        key(tokenizer=train_text_tokenizer(TEXTS[:1])),
        key(variants=1, augmentation=FLIP),
        key(variants=2, augmentation=FLIP),
        key(variants=1, augmentation=FLIP, seed=1),
        key(variants=1, augmentation=replace(FLIP, noise=0.5)),
    ]
    assert len({base, *changed}) == 1 + len(changed)


def test_a_second_build_opens_what_the_first_wrote(tmp_path, records, compact, text, monkeypatch):
    first = TokenCache.build(tmp_path / "cache", records, compact, text, progress=False)

    def fail(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(compact), "encode_image", fail)
    second = TokenCache.build(tmp_path / "cache", records, compact, text, progress=False)
    assert np.array_equal(second.image_codes, first.image_codes)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.key]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut to half":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        last = len(data) - 1 if how == "last bit flipped" else len(data) // 2
        path.write_bytes(data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :])


@pytest.mark.parametrize("how", ["missing", "cut to half", "empty", "one bit flipped", "last bit flipped"])
@pytest.mark.parametrize(
    "name", ["image_codes.npy", "mask_codes.npy", "text_ids.npy", "text_offsets.npy", "texts.json", "meta.json"]
)
def test_a_damaged_cache_is_refused_and_built_again(tmp_path, records, compact, text, name, how, capsys):
    root = tmp_path / "cache"
    cache = TokenCache.build(root, records, compact, text, progress=False)
    good, path = np.array(cache.mask_codes), root / cache.key
    damage(path / name, how)
    # A wrong bit in a hash is told as one in the file of that hash.
    named = r"\.npy" if (name, how) == ("meta.json", "one bit flipped") else name
    with pytest.raises(ValueError, match=f"got a damaged one .*{named}") as refused:
        TokenCache.open(root, cache.key)
    assert "\n" not in str(refused.value)
    capsys.readouterr()
    again = TokenCache.build(root, records, compact, text, progress=False)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(path) in line and re.search(named, line)
    assert again.key == cache.key
    assert np.array_equal(again.mask_codes, good)
    assert [p.name for p in root.iterdir()] == [cache.key]
    TokenCache.build(root, records, compact, text, progress=False)
    assert capsys.readouterr().err == ""


def test_a_cache_of_an_earlier_release_is_read(tmp_path, records, compact, text, capsys):
    """One whose files have a size but no hash."""
    cache = TokenCache.build(tmp_path / "cache", records, compact, text, progress=False)
    meta = tmp_path / "cache" / cache.key / "meta.json"
    meta.write_text(json.dumps({"bytes": json.loads(meta.read_text())["bytes"]}))
    TokenCache.build(tmp_path / "cache", records, compact, text, progress=False)
    assert capsys.readouterr().err == "" and len(json.loads(meta.read_text())) == 1
    damage(meta.with_name("texts.json"), "cut to half")
    with pytest.raises(ValueError, match=r"texts.json is cut off"):
        TokenCache.open(tmp_path / "cache", cache.key)


KILLED = """
import sys, time
from pathlib import Path
from ntpseg.data import Record
from ntpseg.tokenizers import cache
from ntpseg.tokenizers.text import load_text_tokenizer
from ntpseg.tokenizers.auto import load_vision_tokenizer
root = Path(sys.argv[1])
files = sorted(root.glob("i*.png"))
records = [Record(f, f.with_name("m" + f.name[1:]), "The left lung.", "train", f.stem, f.stem) for f in files]
vision = load_vision_tokenizer(root / "vision")
encode = vision.encode_image
def slow(x):
    print("encoding", flush=True)
    time.sleep(60)
    return encode(x)
vision.encode_image = slow
cache.TokenCache.build(root / "cache", records, vision, load_text_tokenizer(root / "text"), progress=False)
"""


def test_a_killed_build_leaves_nothing_that_opens(tmp_path, records, compact, text):
    compact.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"encoding\n"
    process.kill()
    process.wait()
    process.stdout.close()
    left = list((tmp_path / "cache").iterdir())
    assert [p.name.startswith(".building-") for p in left] == [True]
    same = [replace(r, text="The left lung.") for r in records]
    cache = TokenCache.build(tmp_path / "cache", same, compact, text, progress=False)
    assert cache.mask_codes.shape == (7, 1, 8, 8)
    # What a dead process left goes once it is old enough to belong to no living one.
    old = time.time() - 2 * 24 * 3600
    import os

    os.utime(left[0], (old, old))
    TokenCache.build(tmp_path / "cache", same, compact, text, progress=False)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [cache.key]


def test_the_loser_of_a_race_opens_the_winners_cache(tmp_path, records, compact, text, monkeypatch):
    from ntpseg.tokenizers import cache as module

    write, root = module._write, tmp_path / "cache"
    won = []

    def slow(path, *arguments):
        write(path, *arguments)
        if not won:
            won.append(None)
            won[0] = TokenCache.build(root, records, compact, text, progress=False)

    monkeypatch.setattr(module, "_write", slow)
    lost = TokenCache.build(root, records, compact, text, progress=False)
    assert np.array_equal(lost.image_codes, won[0].image_codes)
    assert [p.name for p in root.iterdir()] == [lost.key]


def test_an_error_while_building_leaves_no_folder(tmp_path, records, compact, text):
    records[5].image.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"'c5' must have readable files, got: .*i5.png"):
        TokenCache.build(tmp_path / "cache", records, compact, text, progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_it_pickles_as_a_path(tmp_path, records, compact, text):
    cache = TokenCache.build(tmp_path / "cache", records, compact, text, progress=False)
    data = pickle.dumps(cache)
    assert len(data) < 500
    assert np.array_equal(pickle.loads(data).image_codes, cache.image_codes)


def test_wrong_input_is_named(tmp_path, records, compact, text):
    def build(dataset, **options):
        TokenCache.build(tmp_path / "cache", dataset, compact, text, progress=False, **options)

    with pytest.raises(ValueError, match="records must hold"):
        build([])
    with pytest.raises(ValueError, match="must all have a mask, got 1 without one: 'c2'"):
        build([*records[:2], replace(records[2], mask=None)])
    with pytest.raises(ValueError, match="augmentation must be an Augmentation where variants is 1"):
        build(records, variants=1)
    with pytest.raises(ValueError, match="variants must be an integer >= 0, got -1"):
        build(records, variants=-1)
    with pytest.raises(ValueError, match=r"key must be that of a cache in .* got 'abc'"):
        TokenCache.open(tmp_path, "abc")


def test_stacked_pairs_are_drawn_in_order_and_augmented(records):
    images, masks = stack_pairs(records, 32, 1, progress=False)
    assert images.shape == masks.shape == (7, 1, 32, 32)
    some, _ = stack_pairs(records, 32, 1, limit=3, variants=2, augmentation=FLIP, progress=False)
    assert some.shape == (9, 1, 32, 32)
    assert torch.allclose(some[1], some[0].flip(-1), atol=1e-6)
    assert any(torch.equal(some[0], image) for image in images)


def test_threads_keep_the_order_and_pass_errors_on():
    def slow(i):
        time.sleep(0.02 if i % 3 == 0 else 0)
        if i == 40:
            raise ValueError("forty")
        return i

    assert list(parallel_map(slow, range(30), prefetch=5)) == list(range(30))
    with pytest.raises(ValueError, match="forty"):
        list(parallel_map(slow, range(60), prefetch=5))


def test_meta_lists_every_file(tmp_path, records, compact, text):
    cache = TokenCache.build(tmp_path / "cache", records, compact, text, progress=False)
    path = tmp_path / "cache" / cache.key
    listed = json.loads((path / "meta.json").read_text())["sha256"]
    assert {*listed, "meta.json"} == {p.name for p in path.iterdir()}


def test_a_build_of_more_than_a_day_is_not_litter(tmp_path, records, compact, text, monkeypatch) -> None:
    """Another run that looks at the same folder of caches leaves one alone that is being written to."""

    class Slow:
        def __getattr__(self, name):
            return getattr(compact, name)

        def encode_image(self, images):
            (building,) = root.glob(f"{TEMPORARY_FOLDER}*")
            remove_stale_folders(root)
            assert building.is_dir()
            os.utime(building, (0, 0))
            return compact.encode_image(images)

    root = tmp_path / "cache"
    monkeypatch.setattr(module, "_IMAGES_PER_BATCH", 2)
    assert len(TokenCache.build(root, records, Slow(), text, progress=False)) == 7
