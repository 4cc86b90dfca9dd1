"""3D Slicer's and DICOM's segmentations, COCO: overlapping structures, names, exact masks, and no patient's name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from volume_files import (
    affine,
    image,
    labels,
    save_dicom,
    save_dicom_seg,
    save_nifti,
    save_seg_nrrd,
    save_structure_set,
)

from ntpseg.data import MaskOptions, inspect_dataset, read_mask
from ntpseg.importers import ImportOptions, dicom_seg, import_dataset
from ntpseg.importers.coco import annotation_mask
from ntpseg.importers.names import read_names
from ntpseg.importers.rtstruct import fill_contours
from ntpseg.utils.files import read_csv
from ntpseg.volumes import Geometry

RAS_TO_LPS = np.array([-1, -1, 1])
ORIGIN = affine()[:3, 3] * RAS_TO_LPS


def shown(values: np.ndarray) -> np.ndarray:
    """An array [I, J, K] of `affine` as LPS [D, H, W]."""
    return values.transpose(2, 1, 0)[:, ::-1]


def check_masks(out: Path, volume: str, expected: dict[str, np.ndarray]) -> None:
    """Each row's mask is its slice of the structure [I, J, K], and no slice with a structure is missing."""
    rows = [row for row in read_csv(out / "manifest.csv") if row["volume"] == volume]
    for name, values in expected.items():
        found = {int(row["slice"]): row for row in rows if row["structure"] == name}
        assert sorted(found) == [k for k in range(values.shape[2]) if values[..., k].sum() >= 4]
        for index, row in found.items():
            np.testing.assert_array_equal(read_mask(out / row["mask"]), shown(values)[index])
    assert {row["structure"] for row in rows} == set(expected)
    assert not inspect_dataset(out).problems


def test_slicer_layers_of_a_part_of_the_volume(tmp_path):
    pytest.importorskip("SimpleITK")
    values = labels()
    lesion = np.zeros(values.shape, bool)
    lesion[4:7, 4:7, 2:4] = True  # lies in the liver
    save_nifti(tmp_path / "src" / "p1" / "scan.nii.gz", image(values))
    # Slicer stores from voxel (2, 3, 1) on.
    part = [array.transpose(2, 1, 0)[1:, 3:, 2:] for array in (values, lesion * np.uint8(7))]
    origin = ORIGIN + np.array([2 * 0.7, -3 * 0.8, 2.5])
    segments = [("liver", 0, 1), ("left kidney", 0, 2), ("lesion", 1, 7)]
    save_seg_nrrd(tmp_path / "src" / "p1" / "Segmentation.seg.nrrd", part, segments, origin)
    import_dataset("slicer", tmp_path / "src", tmp_path / "out")
    expected = {"liver": values == 1, "left kidney": values == 2, "lesion": lesion}
    check_masks(tmp_path / "out", "p1", expected)
    shifted = origin + np.array([0.3, 0, 0])
    save_seg_nrrd(tmp_path / "src" / "p1" / "Segmentation.seg.nrrd", part, segments, shifted)
    with pytest.raises(ValueError, match=r"labels of p1 must have the image's grid.*--resample"):
        import_dataset("slicer", tmp_path / "src", tmp_path / "again")
    import_dataset("slicer", tmp_path / "src", tmp_path / "again", ImportOptions(resample=True))
    check_masks(tmp_path / "again", "p1", expected)  # 0.3 mm is less than half a voxel


def test_slicer_of_before_4_11_and_a_volume_that_is_missing(tmp_path):
    pytest.importorskip("SimpleITK")
    values = labels()
    layers = [(values == value).transpose(2, 1, 0).astype(np.uint8) for value in (1, 2)]
    path = save_seg_nrrd(tmp_path / "a.seg.nrrd", layers, [("liver", 0, 0), ("kidney", 0, 0)], ORIGIN, old=True)
    with pytest.raises(ValueError, match=r"a\.seg\.nrrd must have its volume beside it, as a\.nrrd, .* got none"):
        import_dataset("slicer", path, tmp_path / "out")
    save_nifti(tmp_path / "a.nii.gz", image(values))
    save_nifti(tmp_path / "other.nii.gz", image(values))
    import_dataset("slicer", path, tmp_path / "out")
    check_masks(tmp_path / "out", "a", {"liver": values == 1, "kidney": values == 2})


def test_dicom_segmentations_find_their_series_and_name_no_patient(tmp_path):
    pytest.importorskip("highdicom")
    expected = {}
    for number, patient in enumerate(("MRN-4711", "MRN-0815")):
        values = labels(number)
        slices = save_dicom(tmp_path / "src" / f"{number}" / "ct", image(values, number), patient)
        expected[f"subject-{number + 1:04d}_01"] = {"liver": values > 0, "kidney_left": values == 2}
        save_dicom_seg(
            tmp_path / "src" / f"{number}" / "seg" / "x.dcm", slices, {"liver": values > 0, "kidney_left": values == 2}
        )
    import_dataset("dicom-seg", tmp_path / "src", tmp_path / "out", ImportOptions(window="-100..200"))
    for volume, masks in expected.items():
        check_masks(tmp_path / "out", volume, masks)
    rows = read_csv(tmp_path / "out" / "manifest.csv")
    assert {(row["subject"], row["modality"]) for row in rows} == {("subject-0001", "CT"), ("subject-0002", "CT")}
    for path in (tmp_path / "out").rglob("*"):
        assert "MRN" not in path.name and (path.is_dir() or b"MRN" not in path.read_bytes())
    (tmp_path / "src" / "1" / "ct").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"x\.dcm must lie with the series that it was drawn on"):
        import_dataset("dicom-seg", tmp_path / "src", tmp_path / "again")


def test_structure_sets_are_filled_slice_by_slice_with_their_holes(tmp_path):
    pytest.importorskip("pydicom")
    values = labels()
    to_lps = np.diag([-1, -1, 1, 1]) @ affine()

    def square(low: tuple[int, int], high: tuple[int, int], k: float) -> np.ndarray:
        """Around the voxels from `low` to before `high`: corners half a voxel outside of their centres."""
        (i0, j0), (i1, j1) = low, high
        corners = [(i0, j0), (i1, j0), (i1, j1), (i0, j1)]
        return np.array([(to_lps @ [i - 0.5, j - 0.5, k, 1])[:3] for i, j in corners])

    ring = np.zeros(values.shape, bool)
    ring[3:15, 2:16, 2:4] = True
    ring[6:10, 5:9, 3] = False
    contours = [square((3, 2), (15, 16), 2), square((3, 2), (15, 16), 3.2), square((6, 5), (10, 9), 3)]
    slices = save_dicom(tmp_path / "src" / "ct", image(values), "MRN-1")
    box = np.zeros(values.shape, bool)
    box[1:5, 1:5, 4] = True
    rois = {"ring": contours, "box": [square((1, 1), (5, 5), 4)], "planned": []}
    save_structure_set(tmp_path / "src" / "rs.dcm", slices, rois)
    import_dataset("rtstruct", tmp_path / "src", tmp_path / "out")
    check_masks(tmp_path / "out", "subject-0001_01", {"ring": ring, "box": box})
    tilted = contours[0] + np.array([[0, 0, 0], [0, 0, 0], [0, 0, 5], [0, 0, 5]])
    save_structure_set(tmp_path / "src" / "rs.dcm", slices, {"ring": [tilted]})
    with pytest.raises(ValueError, match=r"contours of 'ring' of .*rs\.dcm must lie in the slices of their series"):
        import_dataset("rtstruct", tmp_path / "src", tmp_path / "again")


@pytest.mark.parametrize("step", [1.0, 2.0, 2.5, 3.0, 4.5])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_planes_of_contours_need_not_be_the_slices(step, shift):
    """Of several planes in a slice one counts: two of the same outline do not cancel each other."""
    pytest.importorskip("matplotlib")
    heights = np.arange(0, 16, step) + shift
    outline = [[2, 2], [15, 2], [15, 15], [2, 15]]
    contours = [np.array([[x, y, z] for x, y in outline], float) for z in heights]
    mask = fill_contours("a", contours, Geometry((6, 20, 20), np.diag([1.0, 1.0, 3.0, 1.0])))
    filled = set(np.floor(heights / 3 + 0.5).astype(int)) & set(range(6))
    counts = mask.sum((1, 2))
    assert set(np.flatnonzero(counts)) == filled and len(set(counts[counts > 0])) == 1


def test_the_nearest_plane_is_the_slices():
    pytest.importorskip("matplotlib")
    square = np.array([[2, 2, 0], [12, 2, 0], [12, 12, 0], [2, 12, 0]], float)
    near, far = square + np.array([0, 0, 3.4]), square * 0.5 + np.array([0, 0, 4.2])
    hole = square * 0.2 + np.array([4, 4, 3.5])
    grid = Geometry((3, 20, 20), np.diag([1.0, 1.0, 3.0, 1.0]))
    found = fill_contours("a", [far, near, hole], grid)
    np.testing.assert_array_equal(found, fill_contours("a", [near, hole], grid))
    assert found[1].any() and not found[[0, 2]].any()


def test_a_segmentation_of_one_phase_is_not_laid_on_another(tmp_path):
    pytest.importorskip("highdicom")
    pydicom = pytest.importorskip("pydicom")
    values = labels()
    folder = tmp_path / "src" / "ct"
    first = save_dicom(folder / "1", image(values), "MRN-1")
    second = save_dicom(folder / "2", image(values) + 300, "MRN-1")
    for number, slices in enumerate((first, second), start=1):
        for path in sorted((folder / str(number)).iterdir()):
            one = pydicom.dcmread(path)
            one.SeriesInstanceUID, one.StudyInstanceUID = first[0].SeriesInstanceUID, first[0].StudyInstanceUID
            one.FrameOfReferenceUID, one.AcquisitionNumber = first[0].FrameOfReferenceUID, number
            one.save_as(path)
        for one in slices:
            one.SeriesInstanceUID, one.StudyInstanceUID = first[0].SeriesInstanceUID, first[0].StudyInstanceUID
            one.FrameOfReferenceUID = first[0].FrameOfReferenceUID
    save_dicom_seg(tmp_path / "src" / "seg.dcm", second, {"liver": values == 1})
    (case,) = dicom_seg.read(tmp_path / "src", ImportOptions())
    volume = case.load().image[0]
    np.testing.assert_array_equal(volume.voxels, shown(image(values) + 300))


def coco_files(root: Path, annotations: list[dict]) -> Path:
    (root / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40), np.uint8)
    for name in ("a", "b"):
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
    images = [{"id": n, "file_name": f"{name}.png", "height": 30, "width": 40} for n, name in enumerate("ab")]
    categories = [{"id": 5, "name": "nodule"}, {"id": 9, "name": "effusion"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(content))
    return root / "annotations.json"


def test_coco_polygons_and_both_kinds_of_rle(tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    box, spot, other = np.zeros((3, 30, 40), bool)
    box[5:15, 10:20], spot[8:12, 12:30], other[20:25, 3:9] = True, True, True
    compressed = coco.encode(np.asfortranarray(spot.astype(np.uint8)))
    flat = other.ravel(order="F")
    runs = np.diff(np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1], [True]]))).tolist()
    annotations = [
        {"id": 1, "image_id": 0, "category_id": 5, "segmentation": [[10, 5, 20, 5, 20, 15, 10, 15]]},
        {"id": 2, "image_id": 0, "category_id": 9,
         "segmentation": {"size": [30, 40], "counts": compressed["counts"].decode()}},
        {"id": 3, "image_id": 0, "category_id": 5, "segmentation": {"size": [30, 40], "counts": runs}},
    ]  # fmt: skip
    path = coco_files(tmp_path / "src", annotations)
    import_dataset("coco", path, tmp_path / "out", ImportOptions(negatives=1))
    rows = {(row["image"], row["text"]): row for row in read_csv(tmp_path / "out" / "manifest.csv")}
    for text, mask in (("The nodule.", box | other), ("The effusion.", spot)):
        np.testing.assert_array_equal(read_mask(tmp_path / "out" / rows["images/a.png", text]["mask"]), mask)
    assert len(rows) == 3 and {text[:3] for image_, text in rows if image_ == "images/b.png"} == {"No "}
    assert not inspect_dataset(tmp_path / "out", masks=MaskOptions(keep_empty=True)).problems


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("categories", {"id": 5, "name": "mass"}, "categories of .* must have ids of their own, got the id 5 twice"),
        ("images", {"id": 0, "file_name": "b.png"}, "images of .* must have ids of their own, got the id 0 twice"),
        ("images", {"id": 7, "file_name": "b.png"}, "must list every image once, got b.png in two entries"),
        ("images", {"id": 7, "file_name": "images/b.png"}, "must list every image once, got images/b.png in two"),
        ("images", "b.png", "images of .* must be a list of objects, got 'b.png'"),
    ],
)
def test_coco_entries_that_are_there_twice(tmp_path, key, entry, message):
    pytest.importorskip("pycocotools.mask")
    polygon = [[1, 1, 9, 1, 9, 9, 1, 9]]
    path = coco_files(tmp_path / "src", [{"id": 1, "image_id": 0, "category_id": 5, "segmentation": polygon}])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {key: [*content[key], entry]}))
    with pytest.raises(ValueError, match=message) as caught:
        import_dataset("coco", path, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    if "ids of their own" in message:
        with pytest.raises(ValueError, match=message):
            import_dataset("boxes", path, tmp_path / "out")


def test_coco_sentences_of_an_annotation(tmp_path):
    pytest.importorskip("pycocotools.mask")
    polygon = [[1, 1, 9, 1, 9, 9, 1, 9]]
    sentences = [{"raw": "the upper nodule"}, {"raw": "left one"}]
    path = coco_files(
        tmp_path / "src",
        [{"id": 1, "image_id": 0, "category_id": 5, "segmentation": polygon, "sentences": sentences}],
    )
    import_dataset("coco", path.parent, tmp_path / "out")
    rows = read_csv(tmp_path / "out" / "manifest.csv")
    assert [row["text"] for row in rows] == ["the upper nodule", "left one"]
    assert len({row["mask"] for row in rows}) == 1


def test_compressed_rle_is_read_as_it_was_written_and_whole():
    coco = pytest.importorskip("pycocotools.mask")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mask = np.repeat(np.repeat(rng.random((10, 8)) < rng.random(), 9, 0), 7, 1)
        written = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        rle = {"size": [90, 56], "counts": written}
        np.testing.assert_array_equal(annotation_mask("a", {"segmentation": rle}, (90, 56)), mask)
        if len(written) > 8:
            cut = rle | {"counts": written[:8]}
            with pytest.raises(ValueError, match=r"counts (of \d+ pixels in all|that end within)"):
                annotation_mask("a", {"segmentation": cut}, (90, 56))


@pytest.mark.parametrize(
    ("segmentation", "got"),
    [
        ([], "nothing is marked"),
        ({"size": [3, 4], "counts": [12]}, r"RLE of size \[3, 4\] for an image of \[30, 40\]"),
        ("x", "got 'x'"),
        ({"size": [30, 40], "counts": [100, 50]}, "counts of 150 pixels in all for the 1200 of the image"),
        ({"size": [30, 40], "counts": [1000, 300]}, "counts of 1300 pixels in all"),
        ({"size": [30, 40], "counts": [1300, -100]}, "no whole numbers from 0 on"),
        ({"size": [30, 40], "counts": [600.0, 600.0]}, "no whole numbers from 0 on"),
        ({"size": [30, 40], "counts": "aT1"}, "counts of 1169 pixels"),
        ({"size": [30, 40], "counts": "Q"}, "counts that end within a number"),
        ({"size": [30, 40], "counts": "0 0"}, "' ' in its counts"),
        ([[2, 3, 10, 12]], "a polygon must be three or more pairs"),
        ([[2, 3, 10, 12, 5, 20, 7]], "a polygon must be three or more pairs"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "a polygon far outside of the image"),
        ([[2, 3, 10, 12, 5, "x"]], "a polygon of what are no numbers"),
        ([[2, 3, 10, 12, 5, float("nan")]], "a polygon of what are no numbers"),
    ],
)
def test_coco_annotations_that_are_no_mask(tmp_path, segmentation, got):
    pytest.importorskip("pycocotools.mask")
    annotation = {"id": 4, "image_id": 0, "category_id": 5, "segmentation": segmentation}
    path = coco_files(tmp_path / "src", [annotation])
    with pytest.raises(ValueError, match=f"segmentation of annotation 4 of a must be polygons or RLE, .*{got}"):
        import_dataset("coco", path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n.json", '{"labels": {"0": "background", "1": "liver", "3": "left kidney"}}'),
        ("n.json", '{"liver": 1, "left kidney": 3, "background": 0}'),
        ("n.json", '["background", "liver", "ignore", "left kidney"]'),
        ("n.yaml", "1: liver\n3: left kidney\n"),
        ("n.csv", "id;structure\n0;background\n1;liver\n3;left kidney\n"),
        ("n.tsv", "label\tname\n1\tliver\n3\tleft kidney\n"),
        (
            "n.txt",
            '# ITK-SNAP\n    0     0    0    0        0  0  0    "Clear Label"\n'
            '    1   255    0    0        1  1  1    "liver"\n    3     0  255    0      0.5  1  1    "left kidney"\n',
        ),
    ],
)
def test_files_of_names(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = {one.name: one.parts for one in read_names(tmp_path / name).structures}
    assert found == {"liver": ((0, 1),), "left kidney": ((0, 3),)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.json", '{"1": "a", "2": "a"}', "must have names of their own, got 'a' twice"),
        ("n.json", '{"liver": 1, "liver": 3}', "the key 'liver' is in one object twice"),
        ("n.yaml", "liver: 1\nliver: 3\n", "duplicate key liver"),
        ("n.json", '{"liver": 1.5}', "must map values to names, got 'liver': 1.5"),
        ("n.csv", "id,colour\n1,red\n", "must have a column with the labels' values"),
        ("n.txt", "liver = 1\n", "must have lines such as .* got 'liver = 1' in line 1"),
        ("n.json", '{"background": 0}', "must name at least one label, got none"),
    ],
)
def test_files_of_names_that_are_wrong(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_names(tmp_path / name)
    assert name in str(caught.value)
