"""Packed sets at URLs: fsspec's memory, and HTTP from a server of this test; what fails is tried again, then a line."""

from __future__ import annotations

import http.server
import json
import multiprocessing
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from packed_files import folder_of, packed
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.data import check_records, load_records
from ntpseg.data.shards import ShardError, open_packed, reading, storage
from ntpseg.data.shards.writing import PackOptions, pack_dataset

pytest.importorskip("pyarrow")
fsspec = pytest.importorskip("fsspec")
URL = "memory://bucket/set"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """No waiting between tries, and a memory that is emptied."""
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0))
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()


@pytest.fixture
def remote(tmp_path: Path) -> str:
    pack_dataset(folder_of(tmp_path / "folder"), URL, PackOptions(shard_bytes=1500))
    return URL


def test_a_url_is_packed_to_and_read_from(remote: str, tmp_path: Path) -> None:
    before, after = load_records(tmp_path / "folder"), load_records(remote)
    assert [(r.text, r.case, r.image.read_bytes()) for r in after] == [
        (r.text, r.case, r.image.read_bytes()) for r in before
    ]
    assert check_records(remote) == []
    result = CliRunner().invoke(app, ["data", "check", remote])
    assert result.exit_code == 0 and "12 usable pairs; 0 problems" in result.output
    with pytest.raises(ShardError, match="OUT must be new, got memory://bucket/set"):
        pack_dataset(tmp_path / "folder", URL)


def test_a_batch_is_one_call(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split, calls = open_packed(remote).splits["train"], []
    monkeypatch.setattr(
        fsspec.AbstractFileSystem,
        "cat_ranges",
        lambda self, paths, starts, ends, **kw: (
            calls.append(len(paths)) or [self.cat_file(*r) for r in zip(paths, starts, ends)]
        ),
    )
    split.text(0)
    calls.clear()
    split.prefetch([5, 1, 3], ("image", "mask"))
    assert calls == [6]
    assert split.read(3, "image") and split[1].mask.read_bytes() and calls == [6]


def test_what_is_read_at_once_is_bounded(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_packed(remote).splits["train"]
    keys = [(row, part) for row in (6, 2, 0, 5, 3) for part in ("image", "mask")]
    largest = max(split.size(*key) for key in keys)
    calls: list[list[int]] = []
    original = storage.RemoteStorage.read_many

    def counted(self: Any, ranges: list[storage.Range]) -> list[bytes]:
        calls.append([each.size for each in ranges])
        return original(self, ranges)

    monkeypatch.setattr(storage.RemoteStorage, "read_many", counted)
    for limit in (3 * largest, largest - 1):
        monkeypatch.setattr(reading, "_RECENT", limit)
        split = open_packed(remote).splits["train"]
        split.text(0)
        calls.clear()
        split.prefetch([row for row, part in keys if part == "mask"], ("image", "mask"))
        assert len(calls) == 1  # the rest when it is wanted
        assert [len(split.read(*key)) for key in keys] == [split.size(*key) for key in keys]
        assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in calls)
        assert [size for sizes in calls for size in sizes] == [split.size(*key) for key in keys]
    assert any(sum(sizes) > limit for sizes in calls)  # a file of that size comes alone


def test_missing_and_cut_off_shards_are_named(remote: str, quick: Any) -> None:
    name = open_packed(remote).manifest.splits["train"].shards[0].name
    path = f"/bucket/set/{name}"
    whole = quick.cat_file(path)
    quick.pipe_file(path, whole[:-9])
    with pytest.raises(ShardError, match=rf"{URL}/{name} must have {len(whole)} bytes, got {len(whole) - 9} \(cut"):
        open_packed(remote).splits["train"].read(0, "image")
    quick.rm(path)
    with pytest.raises(ShardError, match=rf"{URL}/{name} must be a file of the packed data set, got no such file"):
        open_packed(remote).splits["train"].read(0, "image")
    with pytest.raises(ShardError, match=r"memory://nothing must be a packed data set, got no packed.json in it"):
        load_records("memory://nothing")


@pytest.mark.parametrize("failures", [2, 3])
def test_requests_are_tried_again(remote: str, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    split = open_packed(remote).splits["train"]
    expected, left = split.read(0, "image"), [failures]
    fresh = open_packed(remote).splits["train"]
    fresh.text(0)
    original = type(fsspec.filesystem("memory")).cat_file

    def failing(self: Any, *args: Any, **kwargs: Any) -> bytes:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionResetError("reset by peer\nwith details")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", failing)
    if failures == 2:
        assert fresh.read(0, "image") == expected
        return
    with pytest.raises(ShardError, match=r"train-00000.parquet must be readable, got in 3 tries: reset by peer with"):
        fresh.read(0, "image")


def test_protocols_without_their_package_are_one_line() -> None:
    with pytest.raises(ShardError, match=r"nothing-such://x must have a protocol that fsspec knows") as caught:
        open_packed("nothing-such://x")
    assert "\n" not in str(caught.value)
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        result = CliRunner().invoke(app, ["data", "check", "http://127.0.0.1:9/set"])
        assert 'run: pip install "ntpseg[streaming]"' in str(result.exception)
        assert isinstance(result.exception, ValueError) and "\n" not in str(result.exception)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges; of each path's first request only an error, where the server is unreliable."""

    root: Path
    ranges = unreliable = True
    seen: set[tuple[str, str]]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.answer(True)

    def answer(self, body: bool) -> None:
        key = (self.command, self.path)
        if self.unreliable and key not in self.seen:
            self.seen.add(key)
            self.send_error(503)
            return
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, status = path.read_bytes(), 200
        whole, wanted = len(content), self.headers.get("Range")
        if wanted and self.ranges:
            start, end = wanted.removeprefix("bytes=").split("-")
            content, status = content[int(start) : int(end) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


class Urllib(fsspec.AbstractFileSystem):
    """HTTP without aiohttp; as fsspec's own it takes every failed `info` for a file that is not there."""

    protocol = "plainhttp"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.replace("plainhttp://", "http://")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(urllib.request.Request(path, method="HEAD")) as answer:
                return {"name": path, "size": int(answer.headers["Content-Length"]), "type": "file"}
        except urllib.error.HTTPError as error:
            raise FileNotFoundError(path) from error

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        request = urllib.request.Request(path, headers={"Range": f"bytes={start}-{(end or 0) - 1}"})
        with urllib.request.urlopen(request) as answer:
            return answer.read()


@contextmanager
def served(root: Path, **options: Any) -> Iterator[tuple[str, list[str]]]:
    """Address of a server of a folder, and the paths that it is asked for the content of."""
    fsspec.register_implementation("plainhttp", Urllib, clobber=True)
    asked: list[str] = []
    handler = type("Own", (Handler,), {"root": root, "seen": set(), "asked": asked, **options})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("client", ["plainhttp", "http"])
def test_http(tmp_path: Path, ranges: bool, client: str) -> None:
    if client == "http":
        pytest.importorskip("aiohttp", reason='pip install "ntpseg[streaming]"')
    packed(tmp_path)
    with served(tmp_path, ranges=ranges) as (address, _):
        url = f"{client}://{address}/set"
        if not ranges:
            with pytest.raises(ShardError, match="must come in ranges"):
                load_records(url)[0].image.read_bytes()
            return
        before, after = load_records(tmp_path / "folder"), load_records(url)
        assert [r.mask.read_bytes() for r in after] == [r.mask.read_bytes() for r in before]
        with pytest.raises(ShardError, match=r"/none must be a packed data set, got no packed\.json"):
            load_records(f"{url}/none")


@pytest.mark.parametrize("client", ["plainhttp", "http"])
def test_the_doctor_looks_at_a_url(tmp_path: Path, client: str) -> None:
    if client == "http":
        pytest.importorskip("aiohttp", reason='pip install "ntpseg[streaming]"')
    out = packed(tmp_path / "one")
    packed(tmp_path / "two", pairs=13)
    with served(tmp_path) as (address, _):

        def doctor(path: str) -> Any:
            return CliRunner().invoke(app, ["doctor", "--data", f"{client}://{address}/{path}", "--json"])

        one, two = doctor("one/set"), doctor("two/set")
        assert one.exit_code == two.exit_code == 0, (one.output, one.exception)
        digests = [json.loads(each.output)["ranks"][0]["data"] for each in (one, doctor("one/set/"), two)]
        assert digests[0] == digests[1] != digests[2] and len(digests[0]) == 16
        shard = next(out.glob("val-*.parquet"))
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-5])
        for path, words in {
            "one/set": f"{shard.name} must have {len(whole)} bytes, got {len(whole) - 5} (cut off); copy it again",
            "one/folder": "/one/folder must be a packed data set, got no packed.json in it",
        }.items():
            message = str(doctor(path).exception)
            assert message.startswith(f"data must be a packed data set on every rank, got on {socket.gethostname()}: ")
            assert words in message and "\n" not in message


def test_processes_copy_an_index_once_and_check_it(tmp_path: Path) -> None:
    packed(tmp_path, pairs=40)
    with served(tmp_path, unreliable=False) as (address, asked):
        url = f"plainhttp://{address}/set"
        split = open_packed(url).splits["train"]
        with multiprocessing.get_context("fork").Pool(4) as pool:
            found = pool.map(_texts, [url] * 8, chunksize=1)
        assert found == [list(split.texts())] * 8
        index = [path for path in asked if path.endswith("train.index.arrow")]
        assert len(index) == 1
        copy = split._index
        assert copy is not None and sorted(path.suffix for path in copy.parent.glob("train*")) == [".arrow", ".lock"]
        # One that is there already is not trusted.
        copy.write_bytes(bytes(copy.stat().st_size))
        assert _texts(url) == found[0] and copy.read_bytes() == (tmp_path / "set" / copy.name).read_bytes()
        copy.unlink()
        damaged = tmp_path / "set" / copy.name
        damaged.write_bytes(bytes(damaged.stat().st_size))
        with pytest.raises(ShardError, match=rf"{url}/{copy.name} must be what was packed, got another SHA-256"):
            _texts(url)
        assert not copy.exists()


def _texts(url: str) -> list[str]:
    return list(open_packed(url).splits["train"].texts())
