"""The API: what is uploaded is segmented as `Segmenter` does it, its tokens in order, its masks downloaded."""

from __future__ import annotations

import base64
import gzip
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving_app import make_client
from serving_files import SHAPE, archive, nifti, nrrd, png, squares, upload
from tiny_segmenter import TEXTS, shared

from ntpseg.generation import DecodingOptions, Segmenter
from ntpseg.volumes import Volume
from ntpseg.volumes.volume import display


def events(client: Any, **request: Any) -> list[dict[str, Any]]:
    answer = client.post("/api/segment", json=request)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def picture(answer: Any) -> np.ndarray:
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png", answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_a_picture_is_segmented_as_the_segmenter_does(client: Any) -> None:
    opened = upload(client, ("x.png", png())).json()
    assert opened["kind"] == "picture" and not opened["spacing_known"]
    assert opened["axes"] == [{"axis": "axial", "count": 1, "height": 40, "width": 56, "spacing": None}]
    np.testing.assert_array_equal(picture(client.get(f"/api/images/{opened['id']}/slice.png")), squares())
    expected = Segmenter(shared()[1], DecodingOptions(dtype="float32")).segment(squares(), TEXTS[0])
    told = events(client, image=opened["id"], text=TEXTS[0])
    assert [event["event"] for event in told] == ["start", *["tokens"] * expected.codes.size, "done"]
    assert told[0]["streams"] and told[0]["grid"] == list(expected.codes.shape)
    tokens = told[1:-1]
    assert [event["first"] for event in tokens] == list(range(expected.codes.size))
    assert [code for event in tokens for code in event["codes"]] == expected.codes.ravel().tolist()
    confidence = [value for event in tokens for value in event["confidence"]]
    np.testing.assert_allclose(confidence, expected.confidence.ravel(), atol=1e-4)
    # Of a read-out by codes the patch that is drawn is that of the code.
    patches = shared()[1].vision.mask_patches().flatten(1).numpy()[expected.codes.ravel()]
    drawn = np.frombuffer(b"".join(base64.b64decode(event["patches"]) for event in tokens), np.uint8)
    np.testing.assert_allclose(drawn.reshape(patches.shape) / 255, patches, atol=0.003)
    done = told[-1]
    assert done["mm2"] is None and done["pixels"] == expected.mask.sum()
    assert done["percent"] == pytest.approx(100 * expected.mask.mean())
    assert done["confidence"] == pytest.approx(float(expected.confidence.mean()))
    place = f"/api/images/{opened['id']}/masks/{done['mask']}"
    np.testing.assert_array_equal(picture(client.get(f"{place}.png")) == 255, expected.mask)
    probability = picture(client.get(f"{place}.png", params={"form": "probability"}))
    assert probability.shape == (40, 56) and (probability[expected.mask] >= 127).all()
    assert client.get(f"{place}.nii.gz").status_code == 400
    assert client.delete(place).status_code == 204
    assert client.get(f"{place}.png").status_code == 404


@pytest.mark.parametrize("packed", ["nii.gz", "nii", "nrrd", "zip"])
def test_a_volumes_slice_is_rendered_and_measured_in_millimetres(client: Any, tmp_path: Path, packed: str) -> None:
    content = nrrd(tmp_path) if packed == "nrrd" else nifti(tmp_path, ".nii" if packed == "nii" else ".nii.gz")
    if packed == "zip":
        content = archive({"a/volume.nii.gz": content, "__MACOSX/a/._volume.nii.gz": b"junk", "a/.DS_Store": b"x"})
    # The name tells nothing.
    answer = upload(client, ("x", content))
    assert answer.status_code == 201, answer.text
    opened = answer.json()
    assert opened["kind"] == "volume"
    axes = {axis["axis"]: axis for axis in opened["axes"]}
    spacing_known = packed != "nrrd" or opened["spacing_known"]
    assert axes["axial"] == {
        "axis": "axial",
        "count": SHAPE[0],
        "height": 40,
        "width": 56,
        "spacing": [2.0, 1.0] if spacing_known else None,
    }
    assert (axes["coronal"]["height"], axes["coronal"]["width"], axes["coronal"]["count"]) == (6, 56, 40)
    pixels = picture(client.get(f"/api/images/{opened['id']}/slice.png", params={"index": 2, "window": "0..255"}))
    np.testing.assert_array_equal(pixels, squares())
    done = events(client, image=opened["id"], text=TEXTS[1], index=2, window="0..255")[-1]
    expected = Segmenter(shared()[1], DecodingOptions(dtype="float32")).segment(squares(), TEXTS[1])
    assert done["pixels"] == expected.mask.sum()
    assert done["mm2"] == (pytest.approx(2 * expected.mask.sum()) if spacing_known else None)


def test_a_whole_volume_streams_its_slices_and_comes_back_as_nifti(client: Any, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    content = nifti(tmp_path)
    image = upload(client, ("ct.nii.gz", content)).json()["id"]
    told = events(client, image=image, text=TEXTS[0], whole=True, window="0..255")
    slices = [event for event in told if event["event"] == "slice"]
    assert [event["index"] for event in slices] == list(range(SHAPE[0]))
    assert [event["done"] for event in slices] == list(range(1, SHAPE[0] + 1))
    expected = Segmenter(shared()[1], DecodingOptions(dtype="float32")).segment(squares(), TEXTS[0])
    done = told[-1]
    assert done["voxels"] == SHAPE[0] * expected.mask.sum()
    assert done["ml"] == pytest.approx(done["voxels"] * 10 / 1000)
    place = f"/api/images/{image}/masks/{done['mask']}"
    np.testing.assert_array_equal(picture(client.get(f"{place}.png", params={"index": 3})) == 255, expected.mask)
    path = tmp_path / "mask.nii.gz"
    path.write_bytes(client.get(f"{place}.nii.gz").content)
    mask, source = nibabel.load(path), nibabel.load(tmp_path / "volume.nii.gz")
    np.testing.assert_allclose(mask.affine, source.affine)
    volume = Volume.from_stored(np.asarray(mask.dataobj).transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ mask.affine)
    np.testing.assert_array_equal(display(volume.voxels, 3, "axial") == 1, expected.mask)
    coronal = picture(client.get(f"{place}.png", params={"index": 15, "axis": "coronal"}))
    np.testing.assert_array_equal(coronal == 255, display(volume.voxels, 15, "coronal") == 1)


def test_dicom_files_of_one_series_are_a_volume_and_of_several_one_is_chosen(client: Any, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from dicom_series import write_series

    first = [(file.name, file.read_bytes()) for file in write_series(tmp_path / "a", number=1)]
    second = [(file.name, file.read_bytes()) for file in write_series(tmp_path / "b", number=2)]
    opened = upload(client, *first, ("README.txt", b"from the hospital"))
    assert opened.status_code == 201, opened.text
    assert opened.json()["modality"] == "CT" and opened.json()["axes"][0]["count"] == 4
    assert "SECRET" not in opened.text
    several = upload(client, *first, *second)
    assert several.status_code == 409 and len(several.json()["series"]) == 2, several.text
    assert "SECRET" not in several.text
    chosen = upload(client, *first, *second, series=several.json()["series"][1]["name"])
    assert chosen.status_code == 201, chosen.text
    zipped = upload(client, ("study.zip", archive({f"s/{name}": content for name, content in first})))
    assert zipped.json()["axes"] == opened.json()["axes"]
    single = upload(client, first[0])
    assert single.json()["axes"][0]["count"] == 1 and single.json()["axes"][0]["spacing"] == [2.0, 1.0]


@pytest.mark.parametrize("method", ["greedy", "speculative", "jacobi"])
def test_concurrent_requests_give_what_single_ones_do(method: str) -> None:
    segmenter = Segmenter(shared()[1], DecodingOptions(dtype="float32"))
    expected = {text: segmenter.segment(squares(), text).mask.sum() for text in TEXTS[:2]}
    found: list[tuple[str, int]] = []
    with make_client(method=method) as client:
        image = upload(client, ("x.png", png())).json()["id"]

        def ask(text: str) -> None:
            found.append((text, events(client, image=image, text=text)[-1]["pixels"]))

        threads = [threading.Thread(target=ask, args=(text,)) for text in TEXTS[:2] * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(found) == sorted((text, expected[text]) for text in TEXTS[:2] * 3)


def test_of_a_four_dimensional_file_one_volume_is_chosen(client: Any, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    voxels = np.stack([np.stack([squares()] * 3).T, np.zeros((56, 40, 3), np.uint8)], axis=-1).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1, 1, 1])), tmp_path / "v.nii")
    content = (tmp_path / "v.nii").read_bytes()
    several = upload(client, ("v.nii", content))
    assert several.status_code == 409 and [one["name"] for one in several.json()["series"]] == ["0", "1"]
    image = upload(client, ("v.nii", content), series="0").json()["id"]
    pixels = picture(client.get(f"/api/images/{image}/slice.png", params={"index": 1, "window": "0..255"}))
    np.testing.assert_array_equal(pixels, squares())


def test_the_model_is_described(client: Any) -> None:
    model = client.get("/api/model").json()
    assert model["name"] == "tiny" and model["examples"] == list(TEXTS[:2])
    assert model["grid"] == list(shared()[1].sequence.mask_grid) and model["method"] == "greedy"
    assert "lung" in model["windows"] and model["window"] is None
    schema = client.get("/api/openapi.json").json()
    assert {"/api/images", "/api/segment", "/api/model"} <= set(schema["paths"])
    # FastAPI's own pages load scripts from another server.
    assert client.get("/docs").status_code == 404 == client.get("/redoc").status_code


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"image": "../../etc/passwd"}, 404, "no such image"),
        ({"text": "  "}, 422, "must be a sentence"),
        ({"text": "x" * 501}, 422, "at most 500 characters"),
        ({"index": 9}, 400, "index must be within"),
        ({"axis": "coronal"}, 400, "axis must be one of"),
        ({"whole": True}, 422, "whole must be false for a picture"),
        ({"text": 3}, 422, "text"),
        ({"other": 3}, 422, "other"),
    ],
)
def test_a_bad_request_is_one_line(client: Any, change: dict[str, Any], status: int, words: str) -> None:
    image = upload(client, ("x.png", png())).json()["id"]
    answer = client.post("/api/segment", json={"image": image, "text": TEXTS[0], **change})
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert words in detail and "\n" not in detail


def test_a_bad_window_is_one_line(client: Any, tmp_path: Path) -> None:
    image = upload(client, ("v.nii", nifti(tmp_path, ".nii"))).json()["id"]
    answer = client.get(f"/api/images/{image}/slice.png", params={"window": "lungs and more"})
    assert answer.status_code == 400 and "window must be" in answer.json()["detail"]
    told = events(client, image=image, text=TEXTS[0], window="nonsense")
    assert told[-1]["event"] == "error" and "window must be" in told[-1]["message"]


def test_gzip_alone_is_unpacked(client: Any) -> None:
    assert upload(client, ("x.png.gz", gzip.compress(png()))).status_code == 201
