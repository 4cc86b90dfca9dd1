"""``ntpseg predict`` on volumes: one CT as NIfTI, DICOM and PNG gives the same masks, on the grid of each file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_segmenter import TEXTS, shared
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.generation import Segmenter
from ntpseg.generation.volume_jobs import VolumeJob
from ntpseg.generation.volume_outputs import volume_target, volume_targets
from ntpseg.utils.files import read_csv
from ntpseg.volumes import Geometry, Volume, list_series

sys.path.insert(0, str(Path(__file__).parents[1] / "volumes"))
from dicom_files import PATIENT_ID, PATIENT_NAME, write_multiframe, write_series

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")
sitk = pytest.importorskip("SimpleITK")

WINDOW = "0..255"
LPS = np.diag([0.7, 0.8, 2.5, 1.0])
LPS[:3, 3] = [-10, 20, 30]
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", "--model", str(shared()[2]), "--dtype", "float32", *map(str, arguments)])


def segment(image: Path, out: Path, *more: object, texts: tuple[str, ...] = TEXTS[:1]) -> Any:
    given = [argument for text in texts for argument in ("--text", text)]
    result = invoke("--image", image, "--out", out, "--axis", "axial", "--window", WINDOW, *given, *more)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(*arguments: object) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, ValueError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def ct(count: int = 4) -> np.ndarray:
    """Four training images as Hounsfield units, ``[D, H, W]`` in LPS."""
    paths = [r.image for r in shared()[0] if np.asarray(Image.open(r.image)).shape == (40, 56)][: 2 * count : 2]
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(np.int16)


def write_nifti(path: Path, voxels: np.ndarray, codes: str = "LPS") -> Path:
    """The CT with its axes turned to `codes` (where i, j and k point)."""
    image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0), TO_RAS @ LPS)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt(tuple("LPS")), nibabel.orientations.axcodes2ornt(tuple(codes))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.as_reoriented(turn), path)
    return path


def labels_lps(path: Path) -> np.ndarray:
    """The labels of a NIfTI file, in LPS."""
    image = nibabel.load(path)
    stored = Geometry(image.shape[::-1], TO_RAS @ image.affine)
    return stored.to_lps(np.asarray(image.dataobj).transpose(2, 1, 0))[0]


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The masks of the CT's slices as PNG files, by the command."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "png").mkdir()
        for k, plane in enumerate(ct()):
            Image.fromarray(plane.astype(np.uint8)).save(folder / "png" / f"{k:03d}.png")
        result = invoke("--image", folder / "png", "--out", folder / "out", "--text", TEXTS[0])
        assert result.exit_code == 0, result.output
        masks = np.stack([np.asarray(Image.open(folder / "out" / f"{k:03d}.png")) > 0 for k in range(len(ct()))])
    assert 0 < masks.mean() < 0.5
    return masks


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LIP", "PSR", "AIL"])
def test_a_nifti_in_any_orientation_gives_the_masks_of_its_slices(
    tmp_path: Path, expected: np.ndarray, codes: str
) -> None:
    source = write_nifti(tmp_path / "ct.nii.gz", ct(), codes)
    segment(source, tmp_path / "out" / "seg.nii.gz")
    np.testing.assert_array_equal(labels_lps(tmp_path / "out" / "seg.nii.gz"), expected)
    before, after = nibabel.load(source), nibabel.load(tmp_path / "out" / "seg.nii.gz")
    assert before.shape == after.shape and after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(before.affine, after.affine)
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(before.header[field], after.header[field])
    first, second = (sitk.ReadImage(str(path)) for path in (source, tmp_path / "out" / "seg.nii.gz"))
    for get in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(first, get)() == getattr(second, get)(), get


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_nrrd_and_metaimage_give_the_masks_of_their_slices(tmp_path: Path, expected: np.ndarray, suffix: str) -> None:
    image = sitk.GetImageFromArray(ct())
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-10, 20, 30))
    sitk.WriteImage(image, str(tmp_path / f"ct{suffix}"))
    segment(tmp_path / f"ct{suffix}", tmp_path / "seg.nii.gz")
    after = sitk.ReadImage(str(tmp_path / "seg.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(after), expected)
    np.testing.assert_allclose(after.GetOrigin(), image.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(after.GetSpacing(), image.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(after.GetDirection(), image.GetDirection(), atol=1e-6)


@pytest.mark.parametrize("kind", ["series", "multi-frame"])
def test_dicom_gives_the_masks_of_its_slices_as_nifti_and_as_dicom_seg(
    tmp_path: Path, expected: np.ndarray, kind: str
) -> None:
    if kind == "series":
        source = write_series(tmp_path / "ct", ct(), LPS)
    else:
        source = write_multiframe(tmp_path / "ct.dcm", ct(), LPS)
    segment(source, tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(labels_lps(tmp_path / "seg.nii.gz"), expected)
    image = sitk.ReadImage(str(tmp_path / "seg.nii.gz"))
    np.testing.assert_allclose(image.GetSpacing(), (0.7, 0.8, 2.5), rtol=1e-6)
    for _ in range(2):
        segment(source, tmp_path / "out" / "seg.dcm")
    dataset = pydicom.dcmread(tmp_path / "out" / "seg.dcm")
    assert dataset.SegmentSequence[0].SegmentLabel == TEXTS[0]
    found = highdicom.seg.segread(tmp_path / "out" / "seg.dcm").get_volume(combine_segments=True)
    stored = Geometry(found.array.shape, found.affine[:, [2, 1, 0, 3]])
    np.testing.assert_array_equal(stored.to_lps(found.array)[0], expected)
    # SimpleITK, which shares no code with highdicom.
    image = sitk.ReadImage(str(tmp_path / "out" / "seg.dcm"))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    voxels, grid = Geometry(image.GetSize()[::-1], affine).to_lps(sitk.GetArrayFromImage(image))
    np.testing.assert_array_equal(voxels > 0, expected)
    np.testing.assert_allclose(grid.affine, LPS, atol=1e-5)


def test_a_sagittal_file_cut_coronally_and_one_slice(tmp_path: Path) -> None:
    voxels = ct()
    volume = Volume.from_stored(voxels, LPS)
    segmenter = Segmenter.from_pretrained(shared()[2], dtype="float32")
    source = write_nifti(tmp_path / "ct.nii.gz", voxels, "PSR")
    segment(source, tmp_path / "seg.nii.gz", "--axis", "coronal")
    wanted = segmenter.segment_volume(volume, TEXTS[0], axis="coronal", window=WINDOW)
    np.testing.assert_array_equal(labels_lps(tmp_path / "seg.nii.gz"), wanted.mask)
    single = write_nifti(tmp_path / "one.nii.gz", voxels[:1], "RAS")
    segment(single, tmp_path / "one_seg.nii.gz")
    one = segmenter.segment(voxels[0].astype(np.uint8), TEXTS[0])
    np.testing.assert_array_equal(labels_lps(tmp_path / "one_seg.nii.gz")[0], one.mask)


def test_several_sentences_become_labels_with_their_names(tmp_path: Path, expected: np.ndarray) -> None:
    source = write_nifti(tmp_path / "ct.nii.gz", ct(), "RAS")
    # The same square twice overlaps wholly; left and right hardly.
    texts = (TEXTS[0], TEXTS[1], "The left square, please.")
    result = segment(source, tmp_path / "out" / "seg.nii.gz", texts=texts)
    labels = labels_lps(tmp_path / "out" / "seg.nii.gz")
    names = json.loads((tmp_path / "out" / "seg.json").read_text(encoding="utf-8"))
    assert names["labels"] == {"background": 0, texts[0]: 1, texts[1]: 2, texts[2]: 3}
    segmenter = Segmenter.from_pretrained(shared()[2], dtype="float32")
    volume = Volume.from_stored(ct(), LPS)
    wanted = segmenter.segment_volume(volume, texts, axis="axial", window=WINDOW)
    painted = np.zeros(labels.shape, np.uint8)
    for number, prediction in enumerate(wanted, start=1):
        painted[prediction.mask] = number
        entry = names["sentences"][number - 1]
        # Overlapping masks are whole in a file of each.
        assert (entry["label"], entry["text"]) == (number, texts[number - 1])
        assert entry["voxels"] == prediction.mask.sum() and entry["file"] == f"seg_{number}.nii.gz"
        np.testing.assert_array_equal(labels_lps(tmp_path / "out" / entry["file"]), prediction.mask)
        assert entry["ml"] == pytest.approx(prediction.mask.sum() * 0.7 * 0.8 * 2.5 / 1000, rel=1e-5)
    np.testing.assert_array_equal(labels, painted)
    assert names["sentences"][2]["overlap_voxels"] > 0 and "also of another sentence" in result.output
    segment(write_series(tmp_path / "dicom", ct(), LPS), tmp_path / "seg.dcm", texts=texts)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert dataset.SegmentsOverlap == "YES" and [s.SegmentLabel for s in dataset.SegmentSequence] == list(texts)
    found = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=False)
    stored = Geometry(found.array.shape[:3], found.affine[:, [2, 1, 0, 3]])
    np.testing.assert_array_equal(stored.to_lps(found.array)[0] > 0, np.stack([p.mask for p in wanted], axis=-1))
    np.testing.assert_array_equal(stored.to_lps(found.array)[0][..., 0] > 0, expected)


def test_sentences_that_do_not_overlap_need_one_file(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "ct.nii.gz", ct(), "RAS")
    segment(source, tmp_path / "out" / "seg.nii.gz", "--largest-component", "--min-ml", "0.05", texts=TEXTS[:2])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["seg.json", "seg.nii.gz"]
    assert "file" not in json.loads((tmp_path / "out" / "seg.json").read_text())["sentences"][0]


def test_a_folder_of_volumes_and_one_that_fails(tmp_path: Path, expected: np.ndarray) -> None:
    folder = tmp_path / "in"
    write_nifti(folder / "a.nii.gz", ct(), "RAS")
    write_series(folder / "b", ct(), LPS)
    whole = (folder / "a.nii.gz").read_bytes()
    (folder / "broken.nii.gz").write_bytes(whole[: len(whole) // 2])
    result = invoke(
        *("--image", folder, "--out", tmp_path / "out", "--axis", "axial", "--window", WINDOW, "--text", TEXTS[0])
    )
    assert result.exit_code == 1, (result.output, result.exception)
    assert "broken.nii.gz: " in result.output and "1 of 3 volumes failed" in result.output
    for name in ("a", "b"):
        np.testing.assert_array_equal(labels_lps(tmp_path / "out" / f"{name}.nii.gz"), expected)
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert [(row["volume"], row["labels"], row["text"]) for row in rows] == [
        ("a.nii.gz", "a.nii.gz", TEXTS[0]),
        ("b", "b.nii.gz", TEXTS[0]),
    ]
    assert {row["axis"] for row in rows} == {"axial"} and int(rows[0]["voxels"]) == expected.sum()


def test_a_table_gives_each_volume_its_sentences(tmp_path: Path, expected: np.ndarray) -> None:
    folder = tmp_path / "in"
    for name in ("a", "b", "c"):
        write_series(folder / name, ct(), LPS)
    table = tmp_path / "texts.csv"
    table.write_text(f"image,text\na,{TEXTS[0]}\nb,{TEXTS[1]}\nb,{TEXTS[0]}\n", encoding="utf-8")
    options = ("--axis", "axial", "--window", WINDOW, "--format", "dcm")
    result = invoke("--image", folder, "--out", tmp_path / "out", "--texts", table, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.dcm", "b.dcm", "predictions.csv"]
    labels = [s.SegmentLabel for s in pydicom.dcmread(tmp_path / "out" / "b.dcm").SegmentSequence]
    assert labels == [TEXTS[1], TEXTS[0]]
    (tmp_path / "one.csv").write_text(f"text\n{TEXTS[0]}\n", encoding="utf-8")
    result = invoke(
        *("--image", folder / "a", "--out", tmp_path / "a.nii.gz", "--texts", tmp_path / "one.csv"), *options[:4]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    np.testing.assert_array_equal(labels_lps(tmp_path / "a.nii.gz"), expected)


def test_nothing_of_the_patient_but_in_the_dicom_object(tmp_path: Path) -> None:
    source = write_series(tmp_path / "ct", ct(), LPS)
    output = segment(source, tmp_path / "out" / "seg.nii.gz").output
    content = b"".join(
        nibabel.load(path).to_bytes() if path.suffix == ".gz" else path.read_bytes()
        for path in (tmp_path / "out").iterdir()
    )
    for secret in (PATIENT_NAME, PATIENT_ID, "Doe", "19700101"):
        assert secret not in output and secret.encode() not in content


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    from ntpseg.utils import files

    source = write_nifti(tmp_path / "ct.nii.gz", ct(2))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    message = refused(
        *("--image", source, "--out", tmp_path / "out" / "o.nii.gz", "--text", "x"),
        *("--axis", "axial", "--window", WINDOW),
    )
    assert message.startswith("labels must be written, got ") and message.endswith("run the same command again")
    assert not list((tmp_path / "out").iterdir())


def test_series_are_volumes_of_their_own_or_chosen(tmp_path: Path, expected: np.ndarray) -> None:
    folder = tmp_path / "study"
    write_series(folder / "chest", ct(), LPS)
    # Alone in a folder, a series is the volume.
    segment(folder, tmp_path / "alone.nii.gz")
    np.testing.assert_array_equal(labels_lps(tmp_path / "alone.nii.gz"), expected)
    write_series(folder / "again", ct(), LPS)
    segment(folder, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["again.nii.gz", "chest.nii.gz"]
    chosen = next(info.name for info in list_series(folder) if info.planes[0].path.parent.name == "chest")
    segment(folder, tmp_path / "out2", "--series", chosen, "--format", "dcm")
    names = {str(pydicom.dcmread(file).SeriesInstanceUID) for file in (folder / "chest").iterdir()}
    dataset = pydicom.dcmread(tmp_path / "out2" / "study.dcm")
    assert {item.SeriesInstanceUID for item in dataset.ReferencedSeriesSequence} == names


def test_what_the_reader_finds_odd_is_told(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(ct(2).transpose(2, 1, 0), None)
    nibabel.save(image, tmp_path / "ct.nii.gz")
    assert "does not say how it lies in the patient" in segment(tmp_path / "ct.nii.gz", tmp_path / "o.nii.gz").output


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before a model is loaded."""
    monkeypatch.setattr(Segmenter, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))


def test_a_scans_sidecar_is_not_replaced(tmp_path: Path) -> None:
    """Tools that convert DICOM write NAME.json beside NAME.nii; only an earlier prediction's is written again."""
    source = write_nifti(tmp_path / "in" / "sub-01.nii", ct())
    sidecar, job = tmp_path / "in" / "sub-01.json", VolumeJob(source, ("x",), "sub-01")
    sidecar.write_text('{"RepetitionTime": 2}')
    with pytest.raises(ValueError, match=r"--out must not replace what is read, got .*sub-01\.json"):
        volume_target(job, tmp_path / "in" / "sub-01.nii.gz", None)
    volume_target(job, tmp_path / "in" / "other.nii.gz", None)
    sidecar.write_text('{"labels": {}, "sentences": []}')
    volume_target(job, tmp_path / "in" / "sub-01.nii.gz", None)


@pytest.mark.usefixtures("no_decoding")
def test_a_folder_of_folders_is_told_where_the_volumes_are(tmp_path: Path) -> None:
    (tmp_path / "raw" / "a").mkdir(parents=True)
    given = ("--text", "x", "--axis", "axial", "--out", tmp_path / "o")
    message = refused("--image", tmp_path / "raw", *given)
    assert message.endswith("raw, a folder without images or volumes")
    for number in (1, 2):
        write_nifti(tmp_path / "raw" / "imagesTr" / f"c{number}.nii", ct())
    message = refused("--image", tmp_path / "raw", *given)
    assert message.startswith("image must be a folder with at least one image, got")
    assert message.endswith("; its folder imagesTr has some: give that")


@pytest.mark.parametrize("name", ["seg.nii.gz", "seg.json", "seg_1.nii.gz", "seg_probability_2.nii.gz", "seg.dcm"])
def test_labels_that_no_prediction_wrote_are_not_replaced(tmp_path: Path, name: str) -> None:
    source = write_nifti(tmp_path / "in" / "ct.nii", ct())
    (tmp_path / "out").mkdir()
    truth = tmp_path / "out" / name
    truth.write_bytes(b"{}")
    out = tmp_path / "out" / ("seg.dcm" if name.endswith("dcm") else "seg.nii.gz")
    job, kind = VolumeJob(source, ("x", "y"), "seg"), "dcm" if name.endswith("dcm") else None
    with pytest.raises(ValueError, match=rf"--out must replace results of .* got .*{name}, which is none"):
        volume_target(job, out, None, maps=True)
    with pytest.raises(ValueError, match=rf"--out must replace results of .* got .*{name}, which is none"):
        volume_targets([job], tmp_path / "in", tmp_path / "out", kind, maps=True)
    (tmp_path / "out" / "predictions.csv").write_text("volume,text,labels,mean_confidence\nct,x," + out.name + ",1\n")
    out.touch()
    volume_target(job, out, None, maps=True)


@pytest.mark.usefixtures("no_decoding")
def test_wrong_arguments_are_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "in" / "ct.nii.gz", ct())
    write_nifti(tmp_path / "in" / "other.nii.gz", ct())
    series = write_series(tmp_path / "dicom", ct(2), LPS)
    (tmp_path / "t.csv").write_text("image,text\nnowhere,x\n", encoding="utf-8")
    (tmp_path / "u.csv").write_text("image,text\nct,x\nct,x\n", encoding="utf-8")
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(picture)
    text = ("--text", "x")
    out = ("--out", tmp_path / "o.nii.gz")
    for arguments, message in (
        (("--image", source, *out), "exactly one of text and texts must be given for a volume, got none"),
        (("--image", source, *out, *text, "--texts", tmp_path / "t.csv"), "got both"),
        (("--image", source, *out, *text, *text), "got 'x' twice"),
        (("--image", source, *out, "--texts", tmp_path / "t.csv"), "got 'nowhere', none of this name, in row 2"),
        (("--image", source, *out, "--texts", tmp_path / "u.csv"), "got 'x' twice"),
        (("--image", source, *out, *text, "--axis", "oblique"), "axis must be one of"),
        (("--image", source, *out, *text, "--window", "nonsense"), "window must be"),
        (("--image", source, *out, *text, "--min-ml", "-1"), "min_ml must be a number >= 0"),
        (("--image", source, *out, *text, "--overlay", tmp_path / "o.png"), "--overlay must be given for images"),
        (("--image", source, "--out", tmp_path / "o.png", *text), "--out must be a folder or end in .nii.gz, .nii or"),
        (("--image", source, "--out", source, *text), "--out must not replace what is read"),
        (("--image", source, "--out", source.parent, *text), "--out must not replace what is read"),
        (("--image", series, "--out", series / "seg.dcm", *text), "--out must not be in the folder that is read"),
        (("--image", source.parent, "--out", source.parent, *text), "--out must not be in a folder that is read"),
        (("--image", source.parent, "--out", tmp_path / "x.nii.gz", *text), "a file's name"),
        (("--image", source.parent, "--out", tmp_path / "o", *text, "--format", "png"), "--format must be one of"),
        (("--image", source, *out, *text, "--format", "dcm"), "--format must be how --out ends, got dcm"),
        (("--image", picture, "--out", tmp_path / "o.png", *text, "--axis", "axial"), "--axis must be given for a"),
        (("--image", picture, "--out", tmp_path / "o.png", *text, *text), "--text must be given once for images"),
    ):
        assert message in refused(*arguments), arguments
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "in" / "picture.png")
    assert "a folder of images or of volumes" in refused(
        *("--image", source.parent, "--out", tmp_path / "o", *text),
    )


def test_what_only_the_model_or_the_volume_can_tell_is_one_line_too(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "ct.nii.gz", ct())
    common = ("--image", source, "--out", tmp_path / "o.nii.gz", "--text", "x")
    assert "(--axis axial)" in refused(*common, "--window", WINDOW)
    assert "(--window soft-tissue" in refused(*common, "--axis", "axial")
    message = refused(*common[:2], "--out", tmp_path / "o.dcm", *common[4:], "--axis", "axial", "--window", WINDOW)
    assert message == "a DICOM-SEG object must be of a DICOM series, got nifti; end --out in .nii.gz"
    assert [path.name for path in tmp_path.iterdir()] == ["ct.nii.gz"]


@pytest.mark.parametrize(
    ("texts", "names"), [(1, ["seg_probability"]), (2, ["seg_probability_1", "seg_probability_2"])]
)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_probabilities_lie_on_the_volumes_grid(tmp_path: Path, texts: int, names: list[str], ending: str) -> None:
    source = write_nifti(tmp_path / "ct.nii.gz", ct(), "PSR")
    for _ in range(2):
        segment(source, tmp_path / "out" / f"seg{ending}", "--save-probabilities", texts=TEXTS[:texts])
    found = segmenter_of_the_command().segment_volume(
        source, TEXTS[:texts], axis="axial", window=WINDOW, probability=True
    )
    maps = sorted(tmp_path.glob("out/*probability*"))
    assert [path.name for path in maps] == [f"{name}{ending}" for name in names]
    for path, prediction in zip(maps, found):
        image, original = nibabel.load(path), nibabel.load(source)
        assert image.shape == original.shape and image.get_data_dtype() == np.float32
        np.testing.assert_array_equal(image.affine, original.affine)
        np.testing.assert_allclose(labels_lps(path), prediction.probability, atol=1e-3)
        np.testing.assert_array_equal(labels_lps(path)[prediction.mask] > 0.499, True)


def segmenter_of_the_command() -> Segmenter:
    return Segmenter.from_pretrained(shared()[2], dtype="float32")
