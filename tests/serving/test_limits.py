"""What is refused: too much, too many, archives that lie, files that point elsewhere, requests of other sites."""

from __future__ import annotations

import gzip
import io
import json
import logging
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_app import make_client
from serving_files import archive, nifti, nrrd, png, squares, upload
from tiny_segmenter import TEXTS

from ntpseg.data.images import encode_png
from ntpseg.serving.images import StoredImage, StoredMask
from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused
from ntpseg.serving.store import ImageStore


def refused(answer: Any, status: int, words: str) -> None:
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert words in detail, detail
    assert "\n" not in detail and "Traceback" not in detail and "/tmp" not in detail and "ntpseg-upload" not in detail


def test_a_long_upload_is_refused_before_it_is_read() -> None:
    with make_client(max_upload_bytes=1000) as client:
        read = 0

        def body() -> Any:
            nonlocal read
            for _ in range(100):
                read += 2**20
                yield b"x" * 2**20

        headers = {"content-type": "multipart/form-data; boundary=b", "content-length": str(100 * 2**20)}
        refused(client.post("/api/images", content=body(), headers=headers), 413, "at most 1,000 bytes")


def test_an_upload_that_hides_its_length_is_refused_on_the_way() -> None:
    with make_client(max_upload_bytes=1000) as client:
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'

        def body() -> Any:
            yield head
            for _ in range(4):
                yield b"x" * 2**20

        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = client.post("/api/images", content=body(), headers=headers)
        assert "content-length" not in answer.request.headers
        refused(answer, 413, "at most 1,000 bytes")
        long = client.post("/api/segment", json={"image": "x", "text": "x" * 2**17})
        refused(long, 413, "at most 65,536 bytes")


def test_numbers_of_files_and_pixels_are_limited(tmp_path: Path) -> None:
    with make_client(max_files=3, max_pixels=2000, max_voxels=5000) as client:
        refused(upload(client, *[("a.png", png())] * 4), 400, "files")
        members = {f"{i}.dcm": b"x" for i in range(4)}
        refused(upload(client, ("a.zip", archive(members))), 413, "at most 3 files")
        refused(upload(client, ("a.png", png())), 413, "at most 2,000 pixels")
        refused(upload(client, ("a.nii.gz", nifti(tmp_path))), 413, "at most 5,000 voxels")
        refused(upload(client, ("a.nrrd", nrrd(tmp_path))), 413, "at most 5,000 voxels")
        assert upload(client, ("a.png", encode_png(squares()[:, :40]))).status_code == 201


@pytest.mark.parametrize(
    ("frames", "status", "words"), [(2**28, 413, "at most 4,096 frames"), (-9, 400, "negative size")]
)
def test_a_small_file_of_many_frames_is_refused_at_once(client: Any, frames: int, status: int, words: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    one = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    one.SOPClassUID, one.Rows, one.Columns, one.NumberOfFrames = pydicom.uid.CTImageStorage, 1, 1, str(frames)
    content = io.BytesIO()
    one.save_as(content)
    started = time.perf_counter()
    refused(upload(client, ("a.dcm", content.getvalue())), status, words)
    assert time.perf_counter() - started < 5


def test_a_damaged_member_is_no_error_of_the_server(client: Any) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("a.png", png())
    broken = bytearray(content.getvalue())
    broken[60:90] = bytes(30)
    refused(upload(client, ("a.zip", bytes(broken))), 400, "readable")


def test_bombs_are_stopped_while_they_unpack() -> None:
    with make_client(max_unpacked_bytes=2**20) as client:
        zeros = bytes(2**24)
        refused(upload(client, ("a.zip", archive({"a.dcm": zeros}))), 413, "at most 1 MiB when unpacked")
        refused(upload(client, ("a.nii.gz", gzip.compress(zeros))), 413, "at most 1 MiB when unpacked")
        twice = gzip.compress(gzip.compress(zeros))
        refused(upload(client, ("a.nii.gz", twice)), 400, "compressed twice")
        inside = archive({"a.nii.gz": gzip.compress(zeros)})
        refused(upload(client, ("a.zip", inside)), 413, "at most 1 MiB when unpacked")
        # Each member is small: their sum counts.
        many = archive({f"{i}.dcm": bytes(2**18) for i in range(8)})
        refused(upload(client, ("a.zip", many)), 413, "at most 1 MiB when unpacked")


def test_the_directory_of_an_archive_is_limited() -> None:
    with make_client(max_files=2) as client:
        many = archive({f"{i:0200d}": b"" for i in range(20)})
        refused(upload(client, ("a.zip", many)), 413, "too many")


def test_no_name_in_an_archive_leads_outside(client: Any, tmp_path: Path) -> None:
    victim = tmp_path / "victim.png"
    names = [str(victim), "../" * 12 + str(victim)[1:], "..\\..\\x.png", "a/../../../x.png"]
    for name in names:
        assert upload(client, ("a.zip", archive({name: png()}))).status_code == 201
        assert not victim.exists()
    link = io.BytesIO()
    with zipfile.ZipFile(link, "w") as packed:
        entry = zipfile.ZipInfo("link.png")
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        packed.writestr(entry, "/etc/passwd")
    refused(upload(client, ("a.zip", link.getvalue())), 400, "must be a readable image")


@pytest.mark.parametrize("line", ["data file: {}", "DATAFILE: {}", "data file: LIST\n{}"])
def test_an_nrrd_header_cannot_name_another_file(client: Any, tmp_path: Path, line: str) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(range(64)))
    header = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n{line.format(secret)}\n\n"
    refused(upload(client, ("a.nrrd", header.encode())), 400, "names another file")


@pytest.mark.parametrize("line", ["ElementDataFile = {}", "ElementDataFile: {}\nElementDataFile = LOCAL"])
def test_a_metaimage_header_cannot_name_another_file(client: Any, tmp_path: Path, line: str) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(range(64)))
    header = f"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n{line.format(secret)}\n"
    refused(upload(client, ("a.mhd", header.encode())), 400, "names another file")
    whole = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    assert upload(client, ("a.mha", whole.encode() + bytes(range(64)))).status_code == 201


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.png", b"", "empty"),
        ("a.png", b"<html>", "web page"),
        ("a.png", png()[:80], "readable image"),
        ("a.zip", archive({"a.png": png()})[:60], "damaged"),
        ("a.zip", archive({}), "no file"),
        ("a.zip", archive({"a.zip": archive({"a.png": png()})}), "readable image"),
        ("a.nii.gz", gzip.compress(png())[:40], "damaged"),
        ("a.dcm", b"\0" * 128 + b"DICM" + b"\xff" * 60, "DICOM"),
        ("a.nii", b"\0" * 344 + b"n+1\0" + b"\0" * 10, "NIfTI"),
    ],
    # Archives hold the time at which they were made: names of their own, so that every worker collects the same.
    ids=["empty", "page", "cut", "cut archive", "empty archive", "nested archive", "cut gzip", "DICOM", "NIfTI"],
)
def test_damage_is_one_line_without_a_path(client: Any, name: str, content: bytes, words: str) -> None:
    refused(upload(client, (name, content)), 400, words)


def test_several_pictures_are_refused(client: Any) -> None:
    refused(upload(client, ("a.png", png()), ("b.png", png())), 400, "drop one file alone")
    refused(client.post("/api/images", data={"files": "x"}), 400, "at least one file")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example:8000"}, 421),
        ({"host": "192.168.1.5:8000"}, 421),
        ({"host": ""}, 421),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
    ],
)
def test_only_its_own_page_under_its_own_name_is_answered(client: Any, headers: dict[str, str], status: int) -> None:
    answer = client.get("/api/model", headers=headers)
    assert answer.status_code == status, answer.text
    assert "access-control-allow-origin" not in answer.headers and "set-cookie" not in answer.headers
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_a_name_can_be_allowed() -> None:
    with make_client(allowed_hosts=("seg.example",)) as client:
        own = {"host": "seg.example", "origin": "https://seg.example"}
        assert client.get("/api/model", headers=own).status_code == 200
        assert client.get("/api/model", headers={"host": "other.example"}).status_code == 421


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e%2fapp.py", "/static/app.py", "/static//etc/passwd"]
)
def test_only_the_pages_files_are_served(client: Any, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_least_recently_used_image_goes_and_all_expire() -> None:
    now = [0.0]
    store = ImageStore(ServerOptions(max_images=2, expire_seconds=10, max_masks=2), lambda: now[0])
    first, second = (store.add(StoredImage(picture=squares())) for _ in range(2))
    assert len({first, second}) == 2 and min(len(first), len(second)) >= 32
    store.get(first)
    third = store.add(StoredImage(picture=squares()))
    with pytest.raises(Refused, match="no longer"):
        store.get(second)
    image = store.get(third)
    names = [store.add_mask(image, StoredMask("", squares() > 9, squares())) for _ in range(3)]
    assert list(image.masks) == names[1:]
    now[0] = 9.0
    store.get(third)
    now[0] = 18.0
    with pytest.raises(Refused):
        store.get(first)
    store.get(third)
    now[0] = 28.0
    store.expire()
    assert len(store) == 0


def test_all_that_is_kept_has_a_limit_in_bytes() -> None:
    store = ImageStore(ServerOptions(max_stored_bytes=10_000))
    names = [store.add(StoredImage(picture=np.zeros((50, 80), np.uint8))) for _ in range(3)]
    assert len(store) == 2
    image = store.get(names[2])
    for _ in range(5):
        store.add_mask(image, StoredMask("", np.zeros((50, 80), bool), np.zeros((50, 80), np.uint8)))
    assert len(store) == 1 and len(image.masks) == 1
    with pytest.raises(Refused, match="memory limit"):
        store.add(StoredImage(picture=np.zeros((200, 80), np.uint8)))


def test_a_full_queue_answers_503_and_a_client_that_leaves_frees_it() -> None:
    import asyncio

    from ntpseg.serving.decoding_queue import DecodingQueue, Job

    go, reached = threading.Event(), threading.Event()
    emitted = []

    def slow(job: Job) -> dict[str, Any]:
        reached.set()
        while not go.is_set():
            job.emit({"event": "tokens"})
            emitted.append(1)
            time.sleep(0.01)
        return {}

    async def run() -> None:
        queue = DecodingQueue(1)
        first = queue.submit(slow)
        second = queue.submit(lambda job: {"answer": 2})
        with pytest.raises(Refused) as full:
            queue.submit(slow)
        assert full.value.status == 503 and "Retry-After" in full.value.headers
        events = first.events()
        assert (await anext(events))["event"] == "tokens"
        # The client of the first goes away: the second is decoded although nobody sets `go`.
        await events.aclose()
        found = [event async for event in second.events()]
        assert found == [{"event": "queued", "ahead": 1}, {"event": "done", "answer": 2}]
        queue.close()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert emitted and not go.is_set()


def test_a_client_that_hangs_up_stops_its_decode(address: str, tmp_path: Path) -> None:
    import httpx

    content = nifti(tmp_path, shape=(400, 40, 56))
    with httpx.Client(base_url=address, timeout=60) as client:
        image = upload(client, ("v.nii.gz", content)).json()["id"]
        request = {"image": image, "text": TEXTS[0], "whole": True, "window": "0..255"}
        with client.stream("POST", "/api/segment", json=request) as answer:
            assert json.loads(next(answer.iter_lines()))["event"] == "start"
        started = time.monotonic()
        told = client.post(
            "/api/segment", json={"image": image, "text": TEXTS[0], "window": "0..255"}
        ).text.splitlines()
    assert json.loads(told[-1])["event"] == "done" and time.monotonic() - started < 20


def test_neither_names_nor_words_of_an_upload_are_logged(client: Any, caplog: Any, monkeypatch: Any) -> None:
    from ntpseg.serving import image_routes

    caplog.set_level(logging.DEBUG)

    def fail(*_: Any) -> None:
        raise RuntimeError("SECRET^NAME")

    monkeypatch.setattr(image_routes, "open_upload", fail)
    from fastapi.testclient import TestClient

    with TestClient(client.app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as quiet:
        answer = upload(quiet, ("SECRET^NAME.dcm", b"x"))
    assert answer.status_code == 500 and "SECRET" not in answer.text
    logged = [record for record in caplog.records if record.name.startswith("ntpseg")]
    assert logged and "RuntimeError" in logged[0].getMessage()
    assert "SECRET" not in caplog.text


def test_nothing_of_an_upload_stays_on_disk(client: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inside = tmp_path / "made"
    inside.mkdir()
    assert upload(client, ("a.nii.gz", nifti(inside))).status_code == 201
    assert upload(client, ("a.png", b"nonsense")).status_code == 400
    assert [path for path in tmp_path.iterdir() if path != inside] == []
