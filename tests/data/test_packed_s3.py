"""Packed sets in an object store with the S3 protocol, by s3fs; the store is moto's server, in this process."""

from __future__ import annotations

import multiprocessing
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packed_files import folder_of
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.data import check_records, load_records
from ntpseg.data.shards import ShardError, open_packed, storage
from ntpseg.data.shards.writing import PackOptions, pack_dataset

pytest.importorskip("pyarrow")
s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")
URL = "s3://bucket/sets/one"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket, found by the environment as a user's would be."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "WAITS", (0.0,))
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = s3fs.S3FileSystem()
    bucket.mkdir("bucket")
    try:
        yield bucket
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        server.stop()


def test_a_bucket_is_packed_to_read_and_checked(store: Any, tmp_path: Path) -> None:
    pack_dataset(folder_of(tmp_path / "folder"), URL, PackOptions(shard_bytes=1500))
    before, after = load_records(tmp_path / "folder"), load_records(URL)
    assert [(r.text, r.image.read_bytes(), r.mask.read_bytes()) for r in after] == [  # type: ignore[union-attr]
        (r.text, r.image.read_bytes(), r.mask.read_bytes())  # type: ignore[union-attr]
        for r in before
    ]
    assert check_records(URL) == []
    split = open_packed(URL).splits["train"]
    split.prefetch(range(len(split)), ("image", "mask"))
    for method in multiprocessing.get_all_start_methods():
        if method != "forkserver":
            with multiprocessing.get_context(method).Pool(2) as pool:
                found = pool.map(_image, [(split, row) for row in range(len(split))], chunksize=1)
            assert found == [split.read(row, "image") for row in range(len(split))]
    with pytest.raises(ShardError, match=r"OUT must be new, got s3://bucket/sets/one, which is a packed data set"):
        pack_dataset(tmp_path / "folder", URL)


def _image(place: tuple[Any, int]) -> bytes:
    split, row = place
    return split[row].image.read_bytes()


def test_what_is_wrong_is_one_line(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_dataset(folder_of(tmp_path / "folder"), URL, PackOptions(shard_bytes=1500))
    name = open_packed(URL).manifest.splits["train"].shards[0].name

    def message(url: str = URL) -> str:
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(ShardError) as caught:
            open_packed(url).splits["train"].read(0, "image")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    whole = store.cat_file(f"bucket/sets/one/{name}")
    store.pipe_file(f"bucket/sets/one/{name}", whole[:-9])
    assert f"{URL}/{name} must have {len(whole)} bytes, got {len(whole) - 9} (cut off)" in message()
    store.rm(f"bucket/sets/one/{name}")
    assert f"{URL}/{name} must be a file of the packed data set, got no such file" in message()
    assert "s3://bucket/none must be a packed data set, got no packed.json in it" in message("s3://bucket/none")
    assert "got in 2 tries: The specified bucket does not exist; check" in message("s3://no-such-bucket/set")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert f"{URL}/packed.json must be readable, got in 2 tries" in message()


def test_training_reads_a_bucket(store: Any, tmp_path: Path) -> None:
    pack_dataset(folder_of(tmp_path / "folder", 18), URL, PackOptions(shard_bytes=1500))
    options = [
        "data.size=16",
        "data.variants=0",
        "model.front_end=features",
        "vision={factor: 4, mask_codes: 8, steps: 2, codebook_steps: 1, width: 8}",
        "text.vocab_size=280",
        "model.overrides={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2, "
        "num_key_value_heads: 2, head_dim: 16}",
        "training.max_steps=3",
        "training.dataloader_num_workers=2",
        "training.bf16=false",
    ]
    result = CliRunner().invoke(app, ["train", "tiny", f"data.path={URL}", f"output={tmp_path / 'run'}", *options])
    assert result.exit_code == 0, (result.output, result.exception)
    assert (tmp_path / "run" / "model").is_dir() and not (tmp_path / "run" / "cache").exists()
